import pytest
import torch

from spinlab.config import TensorQuant
from spinlab.formats.integer import Grid, extremes, zero_point
from spinlab.formats.quantizer import StraightThrough
from spinlab.learn.learned.log_numbers import LogNumbers
from spinlab.learn.learned.weight_ranges import rounding_gradient


def nearest(x):
    """Round with a straight-through gradient: the only piece autograd does not know."""
    return StraightThrough.apply(x, torch.round)


def rounded(weight, log_ratio, format):
    """The quantizer written for autograd: min, max and clamp are differentiated by torch."""
    grid = Grid(format.bits, format.symmetric)
    grouped, lowest, highest = extremes(weight, format.group_size)
    ratio = log_ratio.exp()
    if format.symmetric:
        scale = torch.maximum(highest, -lowest) * ratio / grid.highest
        levels = nearest(grouped / scale).clamp(grid.lowest, grid.highest)
        return (levels * scale).flatten(1)
    lowest, highest = lowest.clamp(max=0) * ratio, highest.clamp(min=0) * ratio
    scale = (highest - lowest) / grid.highest
    exact_zero = -lowest / scale
    zero = exact_zero + (zero_point(lowest, scale) - exact_zero).detach()
    levels = (nearest(grouped / scale) + zero).clamp(grid.lowest, grid.highest)
    return ((levels - zero) * scale).flatten(1)


@pytest.mark.parametrize(
    "format",
    [
        TensorQuant(symmetric=True),
        TensorQuant(),
        TensorQuant(symmetric=True, group_size=8),
        TensorQuant(bits=3, group_size=16),
    ],
    ids=str,
)
def test_the_closed_form_is_autograds_gradient(format):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=g, dtype=torch.float64).requires_grad_()
    groups = 32 // (format.group_size or 32)
    logs = -torch.rand(6, groups, 1, generator=g, dtype=torch.float64)
    logs.requires_grad_()
    upstream = torch.randn(6, 32, generator=g, dtype=torch.float64)
    rounded(weight, logs, format).backward(upstream)
    of_weight, of_log = rounding_gradient(
        weight.detach(), upstream.clone(), format, logs.detach().exp()
    )
    if format.symmetric:
        assert torch.allclose(of_weight, weight.grad, atol=1e-12)
        assert torch.allclose(of_log, logs.grad, atol=1e-12)
    else:  # the zero point is rounded: what its rounding adds is left out, see the docstring
        assert torch.nn.functional.cosine_similarity(of_weight, weight.grad).min() > 0.8


def test_descending_the_ratios_lowers_the_rounding_error():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 128, generator=g)
    format = TensorQuant(bits=3, symmetric=True)
    ratios = LogNumbers(lr=0.05, most=1.0)
    ratios.start({"w": torch.ones(16, 1, 1)})
    errors = []
    for _ in range(30):
        found = rounded(weight, ratios.number("w").log(), format)
        errors.append((found - weight).square().sum().item())
        _, of_log = rounding_gradient(weight, 2 * (found - weight), format, ratios.number("w"))
        ratios.step({"w": of_log}, rate=1.0)
    assert errors[-1] < 0.7 * errors[0]
    assert (ratios.number("w") <= 1).all()


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
