"""Integer formats: levels, ranges, zero, and how ties are rounded."""

import numpy as np
import pytest
import torch

from spinlab.formats import IntegerFormat, Parameters
from spinlab.formats.integer import PARTS, extremes, nearest, settled
from spinlab.formats.integer_numpy import few_levels
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.rotation.online import hadamard_rotation


def round_trip(x: torch.Tensor, grid: IntegerFormat) -> torch.Tensor:
    grouped, lowest, highest = extremes(x, 0)
    parameters = grid.parameters(lowest, highest)
    return grid.decode(grid.encode(grouped, parameters, nearest), parameters).flatten(-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_value_goes_to_the_nearest_level(bits, symmetric):
    """Brute force: compare with the distance to every level of the grid."""
    grid = IntegerFormat(bits, symmetric)
    x = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grouped, lowest, highest = extremes(x, 0)
    parameters = scale, zero = grid.parameters(lowest, highest)
    levels = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    values = scale * (levels - zero)  # (16, 1, levels)
    least = (grouped[..., None] - values[:, :, None]).abs().amin(-1)
    for rounding, farther in ((nearest, 1e-12), (settled, 1.01 / PARTS)):
        levels = grid.encode(grouped, parameters, rounding)
        found = (grid.decode(levels, parameters) - grouped).abs()
        assert (found - least <= farther * scale).all()


@pytest.mark.parametrize("rounding", [nearest, settled])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_are_rounded_half_to_even(bits, symmetric, rounding):
    """On ties as elsewhere; NumPy in float64 is the oracle, on quotients that are exact."""
    grid = IntegerFormat(bits, symmetric)
    x = torch.arange(4 * grid.lowest - 9, 4 * grid.highest + 10) / 4  # with all ties
    for zero in {grid.lowest, 0, grid.highest} if not symmetric else {0}:
        parameters = Parameters(torch.tensor(0.5), torch.tensor(float(zero)))
        found = grid.encode(x * 0.5, parameters, rounding)
        wanted = np.clip(np.rint(x.double().numpy()) + zero, grid.lowest, grid.highest)
        assert np.array_equal(found.double().numpy(), wanted)


def settled_by_definition(exact: np.ndarray) -> np.ndarray:
    """The nearest even number where it is up to half a level and half a part away."""
    even = 2 * np.rint(exact / 2)
    return np.where(np.abs(exact - even) <= 0.5 + 0.5 / PARTS, even, np.rint(exact))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_settle_as_defined(dtype):
    g = torch.Generator().manual_seed(0)
    halves = torch.arange(-255, 256, dtype=torch.float64) / 2
    around = [halves + side * 0.5 / PARTS for side in (-1.05, -0.95, -0.01, 0, 0.01, 0.95, 1.05)]
    anywhere = 512 * torch.rand(100_000, generator=g, dtype=torch.float64) - 256
    exact = torch.cat([*around, anywhere])
    from_even = (exact / 2 - (exact / 2).round()).abs() * 2
    clear = (from_even - 0.5 - 0.5 / PARTS).abs() > 5e-5  # of the noise of float32
    assert clear.double().mean() > 0.99
    scale = torch.tensor(0.37, dtype=dtype)
    x = (exact * scale.double()).to(dtype)
    found, wanted = settled(x, scale)[clear], settled_by_definition(exact[clear].numpy())
    assert np.array_equal(found.double().numpy(), wanted)
    moved = found != nearest(x, scale)[clear]
    assert 0.25 / PARTS < moved[-90_000:].double().mean() < 0.75 / PARTS


def evenly(rows: int, width: int) -> torch.Tensor:
    """Return tokens whose entries are spread evenly over a range that holds 0."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(rows, width, generator=g) - torch.rand(rows, 1, generator=g)
    x[:, 0], x[:, 1] = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    return x


ROUNDERS = {
    "weights": lambda x, grid: round_trip(x, grid),
    "tokens": lambda x, grid: TokenQuantizer(grid).round(x),
    "few tokens": lambda x, grid: torch.from_numpy(few_levels(x, grid, 0, 1.0).decode()).flatten(1),
    "keys and values": lambda x, grid: AffineCodec(grid, x.shape[1]).round(x),
}


@pytest.mark.parametrize("rounder", ROUNDERS)
@pytest.mark.parametrize(
    "grid", [IntegerFormat(4, True), IntegerFormat(4, False), IntegerFormat(8, False)], ids=str
)
def test_rounding_has_no_bias(rounder, grid):
    """The mean error of n entries, each spread evenly over a level, has a deviation of
    1/sqrt(12 n) levels: here 0.0006. A shift of all levels by 1/128 would be 13 of these."""
    x = evenly(1024, 256)
    scale = grid.parameters(x.amin(1, keepdim=True), x.amax(1, keepdim=True)).scale
    error = ((ROUNDERS[rounder](x, grid) - x) / scale)[:, 2:].double()  # without the ends
    inside = error[error.abs() <= 0.51]  # what lies beyond the highest level is cut off
    assert inside.numel() > 0.95 * error.numel()
    assert inside.mean().abs() < 4 / (12 * inside.numel()) ** 0.5


def test_integer_ranges_are_the_fields():
    assert (IntegerFormat(4, True).lowest, IntegerFormat(4, True).highest) == (-8, 7)
    assert (IntegerFormat(4, False).lowest, IntegerFormat(4, False).highest) == (0, 15)


def test_zero_is_exact_and_its_level_lies_on_the_grid():
    """A range that does not hold 0 is extended to it, so the zero point is storable."""
    grid = IntegerFormat(4, False)
    for low, high in ((1.0, 3.0), (-3.0, -1.0), (-2.0, 5.0)):
        parameters = grid.parameters(torch.tensor([low]), torch.tensor([high]))
        assert 0 <= parameters.zero.item() <= 15
        for rounding in (nearest, settled):
            at_zero = grid.encode(torch.zeros(1), parameters, rounding)
            assert grid.decode(at_zero, parameters).item() == 0


def test_constant_zero_input_stays_zero():
    for grid in (IntegerFormat(4, True), IntegerFormat(4, False)):
        assert torch.equal(round_trip(torch.zeros(2, 8), grid), torch.zeros(2, 8))


ACTIVATIONS = sorted(ROUNDERS.keys() - {"weights"})


@pytest.mark.parametrize("path", ACTIVATIONS)
@pytest.mark.parametrize(
    "grid", [IntegerFormat(b, s) for b in (3, 4, 8) for s in (True, False)], ids=str
)
def test_around_every_half_both_sides_take_the_same_level(grid, path):
    """Every half between the ends of a range whose scale is 1."""
    start = -grid.highest if grid.symmetric else -(grid.highest // 2)
    stop = start + 2 * grid.highest if grid.symmetric else start + grid.highest
    halves = torch.arange(start, stop, dtype=torch.float64) + 0.5
    for noise in (-1e-6, -1e-7, 0, 1e-7, 1e-6):
        ends = torch.tensor([start, stop], dtype=torch.float64)
        x = torch.cat([halves * (1 + noise), ends, ends[:1]]).float()
        found = ROUNDERS[path](x[: len(x) // 2 * 2][None], grid)[0, : len(halves)]
        assert torch.equal(found.double(), halves.round())  # torch rounds half to even


@pytest.mark.parametrize("path", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_that_are_quantized_again_are_not_decided_by_float_noise(bits, path):
    """A token that attends to one token takes over numbers that are levels already.

    Whichever share of the steps they use: with 14 of 15, level 7 is at 7.5 of the new ones.
    """
    g, grid = torch.Generator().manual_seed(0), IntegerFormat(bits, False)
    for steps in range(grid.highest // 2, grid.highest + 1):
        start = -(steps // 2)
        levels = torch.arange(start, start + steps + 1).repeat(2)  # an even number of them
        x = 0.37 * levels.double()[None]
        expected = ROUNDERS[path](x.float(), grid)
        for _ in range(5):
            noise = 1 + 1e-7 * torch.randn(x.shape, generator=g, dtype=torch.float64)
            found = ROUNDERS[path]((x * noise).float(), grid)
            assert (found - expected).abs().max() < 1e-3 * 0.37


@pytest.mark.parametrize("path", ACTIVATIONS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_massive_token_is_not_decided_by_float_noise(bits, path):
    """c·e_j under a Hadamard is ±c/sqrt(n): min = -max, zero point 7.5 and all entries on ties.

    With round-half-even alone the noise of another summation order flips half of a token.
    """
    grid = IntegerFormat(bits, False)
    token = torch.zeros(1, 576)
    token[0, 3] = 1000.0
    rotated = hadamard_rotation(576)(token)
    generator = torch.Generator().manual_seed(0)
    expected = ROUNDERS[path](rotated, grid)
    assert (expected - rotated).abs().max() < 1.02 * rotated.max() / grid.highest  # half a level
    for _ in range(20):
        noise = 1 + 1e-6 * torch.randn(rotated.shape, generator=generator)
        found = ROUNDERS[path](rotated * noise, grid)
        assert (found - expected).abs().max() < 1e-3 * rotated.max()


def test_rounded_to_the_nearest_the_same_token_would_flip():
    """The test above can fail: plain rounding does flip, by a whole level."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-1.0, 1.0]).repeat(8)

    def plain(x: torch.Tensor) -> torch.Tensor:
        scale = (x.max() - x.min()) / 15
        zero = torch.round(-x.min() / scale)
        return scale * (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero)

    flips = [
        (plain(x * (1 + 1e-5 * torch.randn(16, generator=generator))) - plain(x)).abs().max()
        for _ in range(20)
    ]
    assert max(flips) > 0.1
