"""Positive parameters, learned through their logarithms: bounds, and steps after a resume."""

import torch

from spinlab.learn.learned import LogParameters


def move(values: LogParameters, steps: range) -> None:
    """Step by gradients that depend on the step alone."""
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        values.logs["w"].grad = torch.randn(4, 1, 1, generator=generator)
        values.step(1.0)


def started(value: float = 0.8) -> LogParameters:
    found = LogParameters(0.1, most=1.0)
    found.start({"w": torch.full((4, 1, 1), value)})
    return found


def test_a_resumed_set_of_parameters_takes_the_same_steps():
    whole, first, second = started(), started(), LogParameters(0.1, most=1.0)
    move(whole, range(5))
    move(first, range(3))
    second.load_state({k: v.clone() for k, v in first.state().items()}, torch.device("cpu"))
    move(second, range(3, 5))
    assert torch.equal(second.value("w"), whole.value("w"))


def test_without_a_start_there_is_nothing_to_step():
    empty = LogParameters(0.1)
    empty.step(1.0)
    assert empty.logs == empty.state() == {}


def test_values_stay_positive_and_below_their_bound():
    values = started(0.99)
    values.logs["w"].grad = torch.tensor([-1.0, -1.0, 1e30, 0.0])[:, None, None]
    values.step(5.0)
    found = values.value("w").flatten()
    assert (found > 0).all() and (found <= 1).all()
    assert found[0] == 1
    assert torch.allclose(found[3], torch.tensor(0.99))
