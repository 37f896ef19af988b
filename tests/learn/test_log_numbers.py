"""Numbers that are learned as their logarithms."""

import torch

from spinlab.learn.learned.log_numbers import LogNumbers


def test_a_resumed_set_of_ratios_takes_the_same_steps():
    def gradient(i: int) -> dict[str, torch.Tensor]:
        return {"w": torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(i))}

    whole, first, second = (LogNumbers(0.1, most=1.0) for _ in range(3))
    for ratios in (whole, first):
        ratios.start({"w": torch.full((4, 1, 1), 0.8)})
    for i in range(5):
        whole.step(gradient(i), 1.0)
    for i in range(3):
        first.step(gradient(i), 1.0)
    second.load_state({k: v.clone() for k, v in first.state().items()}, torch.device("cpu"))
    for i in range(3, 5):
        second.step(gradient(i), 1.0)
    assert torch.equal(second.number("w"), whole.number("w"))
