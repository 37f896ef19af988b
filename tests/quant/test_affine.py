import pytest
import torch

from spinlab.quant.affine import TIE, Grid, decode, encode, extremes, scale_and_zero
from spinlab.rotation.online import hadamard_rotation


def round_trip(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    grouped, lowest, highest = extremes(x, 0)
    scale, zero = scale_and_zero(lowest, highest, grid)
    return decode(encode(grouped, scale, zero, grid), scale, zero, grid).flatten(-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_value_goes_to_the_nearest_level(bits, symmetric):
    """Brute force: compare with the distance to every level of the grid."""
    grid = Grid(bits, symmetric)
    x = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grouped, lowest, highest = extremes(x, 0)
    scale, zero = scale_and_zero(lowest, highest, grid)
    levels = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    values = scale * (levels - zero)  # (16, 1, levels)
    nearest = (grouped[..., None] - values[:, :, None]).abs().amin(-1)
    found = (decode(encode(grouped, scale, zero, grid), scale, zero, grid) - grouped).abs()
    assert (found - nearest <= 2 * TIE * scale).all()


def test_integer_ranges_are_the_fields():
    assert (Grid(4, True).lowest, Grid(4, True).highest) == (-8, 7)
    assert (Grid(4, False).lowest, Grid(4, False).highest) == (0, 15)


def test_zero_is_exact_and_its_level_lies_on_the_grid():
    """A range that does not hold 0 is extended to it, so the zero point is storable."""
    grid = Grid(4, False)
    for low, high in ((1.0, 3.0), (-3.0, -1.0), (-2.0, 5.0)):
        scale, zero = scale_and_zero(torch.tensor([low]), torch.tensor([high]), grid)
        assert 0 <= zero.item() <= 15
        at_zero = encode(torch.zeros(1), scale, zero, grid)
        assert decode(at_zero, scale, zero, grid).item() == 0


def test_constant_zero_input_stays_zero():
    for grid in (Grid(4, True), Grid(4, False)):
        assert torch.equal(round_trip(torch.zeros(2, 8), grid), torch.zeros(2, 8))


def test_a_massive_token_is_not_decided_by_float_noise():
    """c·e_j under a Hadamard is ±c/sqrt(n): min = -max, zero point 7.5 and all entries on ties.

    With round-half-even the noise of another summation order flips whole tokens by a level.
    """
    grid = Grid(4, False)
    token = torch.zeros(1, 576)
    token[0, 3] = 1000.0
    rotated = hadamard_rotation(576)(token)
    generator = torch.Generator().manual_seed(0)
    expected = round_trip(rotated, grid)
    for _ in range(20):
        noise = 1 + 1e-5 * torch.randn(rotated.shape, generator=generator)
        assert (round_trip(rotated * noise, grid) - expected).abs().max() < 1e-3 * rotated.max()


def test_without_the_shift_the_same_token_would_flip():
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
