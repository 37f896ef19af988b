"""LSQ's gradient against autograd, and its twins against the definition."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.gradient import pull_back, round_in_range
from spinlab.formats.integer import extremes, nearest, settled
from spinlab.formats.integer_triton import pull_back_rows, round_rows
from spinlab.formats.quantizer import StraightThrough, TokenQuantizer
from spinlab.learn.learned import LogParameters

FORMATS = [
    IntegerFormat(4, False),
    IntegerFormat(4, True),
    IntegerFormat(8, False),
    IntegerFormat(3, True),
]
GROUPS = [0, 8]


def straight(x, rounding):
    """Round with a straight-through gradient: the only piece autograd does not know."""
    return StraightThrough.apply(x, lambda t: rounding(t, torch.ones((), dtype=t.dtype)))


def within(grouped, lowest, highest, format, rounding):
    """The round trip written for autograd: what lies outside goes along with the end it passes.

    The last level is not quite that end where the zero point is rounded; they are a constant number
    of steps apart. What lies inside goes to the nearest level, which may be the last.
    """
    bottom, top = lowest.clamp(max=0), highest.clamp(min=0)
    if format.symmetric:
        scale, zero = torch.maximum(top, -bottom) / format.highest, 0
        bottom, top = scale * format.lowest, torch.maximum(top, -bottom)
    else:
        scale = (top - bottom) / format.highest
        _, zero = format.parameters(bottom.detach(), top.detach())
    levels = straight(grouped / scale, rounding)
    over = levels.detach() + zero - format.highest
    levels = levels - over.clamp(min=0)  # the zero point is rounded
    levels = levels - (levels.detach() + zero - format.lowest).clamp(max=0)
    off = 0 if format.symmetric else (zero + bottom / scale).detach() * scale
    found = torch.where(grouped > top, top - off, levels * scale)
    return torch.where(grouped < bottom, bottom - off, found)


def rounded(x, log_ratio, format, group_size, rounding=settled):
    """The same in ranges that are a ratio of the extremes."""
    grouped, lowest, highest = extremes(x, group_size)
    ends = lowest * log_ratio.exp(), highest * log_ratio.exp()
    return within(grouped, *ends, format, rounding).flatten(-2)


def random(shape, seed=0, dtype=torch.float64):
    """Rows of different spread and mean: some have one sign, some both."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=dtype)
    shift = 4 * torch.randn(*shape[:-1], 1, generator=g, dtype=dtype)
    return (x + shift) * torch.rand(*shape[:-1], 1, generator=g, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("grid", FORMATS, ids=str)
def test_values_are_the_token_quantizers(grid, group_size, dtype):
    x, log = random((3, 5, 32)).to(dtype), torch.tensor(0.83).log()
    plain = TokenQuantizer(grid, group_size, log.exp().item()).round(x)
    assert torch.equal(round_in_range(x, log, grid, group_size), plain)


@pytest.mark.parametrize("ratio", [1.0, 0.7])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("grid", FORMATS, ids=str)
def test_the_closed_form_is_autograds_gradient(grid, group_size, ratio):
    found, expected = [], []
    for function, results in ((round_in_range, found), (rounded, expected)):
        x = random((4, 6, 32)).requires_grad_()
        log = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
        function(x, log, grid, group_size).backward(random((4, 6, 32), seed=1))
        results += [x.grad, log.grad]
    for ours, autograds in zip(found, expected, strict=True):
        assert torch.allclose(ours, autograds, rtol=1e-12, atol=1e-13)


RULES = {"weights": nearest, "activations": settled}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_gradient_of_the_ends_of_a_range_is_autograds(format, group_size, rule):
    grouped, lowest, highest = extremes(random((6, 32)), group_size)
    upstream = random(grouped.shape, seed=1)
    leaves = [t.clone().requires_grad_() for t in (grouped, 0.7 * lowest, 0.6 * highest)]
    within(*leaves, format, RULES[rule]).backward(upstream)
    ends = (0.7 * lowest, 0.6 * highest)
    found = format.pull_back(grouped, upstream, *ends, RULES[rule])
    for ours, leaf in zip(found, leaves, strict=True):
        assert torch.allclose(ours, leaf.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_with_a_ratio_for_each_group_the_closed_form_is_autograds(format, group_size, rule):
    weight, upstream = random((2, 6, 32)), random((2, 6, 32), seed=1)
    logs = -random((2, 6, 32 // (group_size or 32), 1), seed=2).abs()
    leaves = weight.clone().requires_grad_(), logs.clone().requires_grad_()
    rounded(*leaves, format, group_size, RULES[rule]).backward(upstream)
    found = pull_back(weight, upstream, logs.exp(), format, group_size, RULES[rule])
    for ours, leaf in zip(found, leaves, strict=True):
        assert torch.allclose(ours, leaf.grad, rtol=1e-12, atol=1e-13)


def test_what_is_clipped_above_moves_with_the_upper_end_even_if_its_level_is_that_of_zero():
    """Of a range that hardly reaches above 0, the highest level stands for 0."""
    weight = torch.tensor([[-3.9, -2.0, 0.1, 0.12]], dtype=torch.float64)
    lowest, highest = torch.tensor([[-3.9]]), torch.tensor([[0.01]])
    assert IntegerFormat(4, False).parameters(lowest, highest).zero == 15
    upstream = torch.tensor([[0.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    ends = lowest.double(), highest.double()
    found = IntegerFormat(4, False).pull_back(weight * 3, upstream, *ends, nearest)
    assert found.highest == pytest.approx(3, abs=0.01) and not found.x.any()
    assert found.lowest + found.highest == pytest.approx(3, abs=1e-12)


def test_noise_around_an_end_of_0_does_not_choose_the_side():
    """Inputs of o_proj: the values of one token, some of them on the zero point."""
    x = torch.tensor([[-1.1, -0.4, -0.2, 0.0]], dtype=torch.float64)
    upstream = torch.tensor([[0.3, -0.2, 0.1, 1.0]], dtype=torch.float64)
    for noise in (-1e-16, 0.0, 1e-16):
        x[0, 3] = noise
        ends = 0.9 * x.amin(-1, keepdim=True), 0.9 * x.amax(-1, keepdim=True)
        of_x = FORMATS[0].pull_back(x, upstream, *ends, settled).x
        assert of_x.tolist() == [[0, -0.2, 0.1, 1.0]]


def test_descending_the_ratios_lowers_the_rounding_error():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    format = IntegerFormat(3, True)
    ratios = LogParameters(lr=0.05, most=1.0)
    ratios.start({"w": torch.ones(16, 1, 1)})
    errors = []
    for _ in range(30):
        ratio = ratios.value("w")
        found = rounded(weight, ratio.log(), format, 0, nearest)
        errors.append((found - weight).square().sum().item())
        _, of_log = pull_back(weight, 2 * (found - weight), ratio, format, 0, nearest)
        ratios.logs["w"].grad = of_log
        ratios.step(rate=1.0)
    assert errors[-1] < 0.7 * errors[0]
    assert (ratios.value("w") <= 1).all()


def test_where_values_are_clipped_the_gradient_is_the_slope():
    """Clipped entries move with the range alone: there is nothing to pass straight through."""
    grid, h = IntegerFormat(4, True), 1e-6
    x, log = random((8, 32)), torch.tensor(0.6, dtype=torch.float64).log()
    clipped = x.abs() > 1.25 * 0.6 * x.abs().amax(-1, keepdim=True)  # the lowest level is -8/7
    upstream = random((8, 32), seed=1) * clipped
    wanted = x.clone().requires_grad_(), log.clone().requires_grad_()
    round_in_range(*wanted, grid).backward(upstream)

    def slope(dx, dlog):
        values = [round_in_range(x + s * dx, log + s * dlog, grid) for s in (h, -h)]
        return ((values[0] - values[1]) * upstream).sum() / (2 * h)

    assert torch.allclose(wanted[1].grad, slope(torch.zeros_like(x), 1.0), rtol=1e-6)
    direction = random((8, 32), seed=2) * clipped
    assert torch.allclose((wanted[0].grad * direction).sum(), slope(direction, 0.0), rtol=1e-6)


# what LSQ takes for noise of rounding, and is not: of the last cell of a symmetric range, which
# ends at its level, numbers and their errors go together; by width of a group and bits
BEYOND_LSQ = {16: (0.026, 0.015), 32: (0.016, 0.01), 64: (0.012, 0.006), 576: (0.007, 0.002)}


@pytest.mark.parametrize("width", BEYOND_LSQ)
@pytest.mark.parametrize("grid", [*FORMATS, IntegerFormat(3, False)], ids=str)
def test_over_many_tokens_the_gradient_is_the_slope_of_the_error(grid, width):
    """Steps of the staircase average out: then LSQ knows what a smaller range does.

    A range of 0.97 clips the extreme of a group, which is one number in 16 and always outside.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn((1 << 20) // width, width, generator=g, dtype=torch.float64)

    def error(log):
        return (round_in_range(x, log, grid) - x).square().sum() / x.square().sum()

    for ratio in (0.97, 0.95, 0.9, 0.8, 0.7, 0.5):
        log = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
        error(log).backward()
        with torch.no_grad():
            slope = (error(log + 0.005) - error(log - 0.005)) / 0.01
        near = 0.007 if grid.bits == 3 and grid.symmetric else 0.002
        if grid.symmetric and ratio > 0.7:
            near = BEYOND_LSQ[width][grid.bits > 3]
        assert log.grad.item() == pytest.approx(slope.item(), abs=near), ratio


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_of_numbers_below_the_smallest_scale_do_nothing(bits, symmetric):
    """The scale stays as it is, whatever the ratio: nothing is clipped, and nothing moves."""
    grid = IntegerFormat(bits, symmetric, half_scale=True)
    x, upstream = 1e-6 * random((4, 64)), random((4, 64), seed=1)
    logs = [torch.tensor(ratio, dtype=torch.float64).log() for ratio in (0.9, 0.5)]
    assert torch.equal(*(round_in_range(x, log, grid) for log in logs))
    for log in logs:
        of_x, of_log = pull_back(x, upstream, log.exp(), grid, 0, settled)
        assert torch.equal(of_x, upstream) and not of_log.any()


@pytest.mark.parametrize("grid", [IntegerFormat(4, False), IntegerFormat(4, True)], ids=str)
def test_tied_extremes_share_evenly_and_empty_rows_keep_their_gradient(grid):
    x = torch.tensor([[2.0, 2.0, -0.3, 0.1], [0.0, 0.0, 0.0, 0.0]])
    upstream = torch.tensor([[0.5, 0.5, 1.0, -1.0], [1.0, 2.0, 3.0, 4.0]])
    of_x, of_log = pull_back(x, upstream, torch.tensor(0.8), grid, 0, settled)
    assert of_x[0, 0] == of_x[0, 1]
    assert torch.equal(of_x[1], upstream[1])
    assert of_x.isfinite().all() and of_log.isfinite().all()


def test_a_microbatch_of_any_shape_reaches_the_one_ratio():
    """Gradients of parts add up to that of the whole, in whichever way memory is laid out."""
    x, upstream = random((6, 4, 32)), random((6, 4, 32), seed=1)
    whole, parts = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    round_in_range(x, whole, FORMATS[0], 8).backward(upstream)
    for i in (0, 3):
        turned = x[i : i + 3].transpose(0, 1)
        round_in_range(turned, parts, FORMATS[0], 8).backward(upstream[i : i + 3].transpose(0, 1))
    assert torch.allclose(whole.grad, parts.grad)


INTERPRETED = """
from dataclasses import replace
import torch
from spinlab.formats import integer_triton as fused
from spinlab.formats import gradient as ranged
from spinlab.formats import IntegerFormat
from spinlab.formats.integer import settled
from spinlab.formats.quantizer import TokenQuantizer

g = torch.Generator().manual_seed(0)
for shape, group in (((5, 24), 0), ((3, 4, 40), 8), ((5, 5000), 0)):
    for grid in (IntegerFormat(4, False), IntegerFormat(4, True), IntegerFormat(8, False)):
        for ratio in (torch.tensor(1.0), torch.tensor(0.8)):
            x = torch.randn(shape, generator=g) + torch.randn(*shape[:-1], 1, generator=g)
            x[0], x[1] = 0, x[1].sign()
            near = 1 + 1e-6 * torch.randn(shape[1:], generator=g)
            x[2] = torch.randint(-13, 14, shape[1:], generator=g) / 2 * near
            x[2, ..., :2] = torch.tensor([-7, 7])  # a scale of 1, or of 14/15
            upstream = torch.randn(shape, generator=g)
            quantizer = TokenQuantizer(grid, group, ratio.item())
            value = quantizer.decode(quantizer.encode(x))
            assert torch.equal(fused.round_rows(x, grid, group, ratio), value)
            assert torch.equal(fused.round_rows(x, grid, group, ratio.item()), value)
            half = replace(grid, half_scale=True)
            quantizer = TokenQuantizer(half, group, ratio.item())
            value = quantizer.decode(quantizer.encode(x))
            assert torch.equal(fused.round_rows(x, half, group, ratio.item()), value)
            for kind in (grid, half):
                coded = TokenQuantizer(kind, group, ratio.item()).to_bytes(x)
                for given in (ratio, ratio.item()):
                    there = fused.encode_rows(x, kind, group, given)
                    for ours, theirs in zip(there, coded):
                        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), kind
            for kind in (grid, half):
                for size in (1.0, 1e-6):
                    given = x * size, upstream, ratio, kind, group
                    found, wanted = fused.pull_back_rows(*given), ranged.pull_back(*given, settled)
                    sums = (found[0], found[1].sum()), (wanted[0], wanted[1].sum())
                    for ours, theirs in zip(*sums):
                        close = torch.allclose(ours, theirs, rtol=1e-5, atol=3e-6)
                        assert close, (shape, kind, ratio, size)
x = torch.ones(3, 4)
x[0, 1], x[2, 2] = float("nan"), float("-inf")
scales = fused.encode_rows(x, IntegerFormat(4, True), 0, 1.0)[1].flatten()
assert scales.isnan().tolist() == [True, False, True]
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_interpreted_kernels_do_what_torch_does():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 576), (100, 11008), (7, 5, 40)], ids=str)
@pytest.mark.parametrize("grid", FORMATS, ids=str)
def test_cuda_kernels_do_what_torch_does(grid, shape, dtype):
    x, upstream = (random(shape, seed).to("cuda", dtype) for seed in (0, 1))
    for group, ratio in ((0, 1.0), (0, 0.8), (8, 0.8)):
        clip = torch.tensor(ratio, device="cuda")
        quantizer = TokenQuantizer(grid, group, ratio)
        value = quantizer.decode(quantizer.encode(x)).to(dtype)
        assert torch.equal(round_rows(x, grid, group, clip), value)
        coded = quantizer.to_bytes(x)
        by_definition = quantizer.to_bytes(x.cpu())
        for ours, theirs in zip(coded, by_definition, strict=True):
            assert torch.equal(ours.cpu(), theirs)
        of_x, of_log = pull_back_rows(x, upstream, clip, grid, group)
        of_x_there, of_log_there = pull_back(x, upstream, clip, grid, group, settled)
        unit = torch.finfo(dtype).eps
        assert torch.allclose(of_x, of_x_there, rtol=2 * unit, atol=max(unit / 8, 1e-4))
        assert torch.allclose(of_log.sum(), of_log_there.sum(), rtol=1e-3, atol=0.1)
