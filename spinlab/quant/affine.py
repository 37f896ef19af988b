"""Affine integer arithmetic, said once: every quantizer, codec and kernel of spinlab uses these.

Asymmetric grids hold 0..2^b-1 with a rounded zero point, symmetric ones -2^(b-1)..2^(b-1)-1 with
zero point 0. The range always contains 0, so the zero point always lies on the grid.
"""

from dataclasses import dataclass

import torch

# A massive-activation token is nearly c·e_j; a Hadamard rotation spreads it to ±c/sqrt(n) in every
# channel. Then min = -max, the asymmetric zero point is 7.5, and the lower half of the entries lies
# at -7.5: float noise alone would choose the sides. (The upper half, at 7.5 or above, ends on the
# highest level either way, and on symmetric grids a range ends on levels.) A shift by TIE, far
# above that noise and far below a level, settles these two ties the same way in every
# implementation: of zero points, and of what lies at the low end of a token. All else is rounded
# half to even, because a shift of all levels would be a bias.
TIE = 2.0**-7

SMALLEST_SCALE = torch.finfo(torch.float32).tiny * 2**20  # of float32; its inverse is finite
SMALLEST_HALF = 2.0**-14  # the smallest normal float16, where scales are stored as such


@dataclass(frozen=True)
class Grid:
    """Name the integer levels of a quantizer: `bits` in 2..16 and symmetric or not."""

    bits: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


def scale_and_zero(
    lowest: torch.Tensor, highest: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map a float range to the scale and zero point of a grid.

    lowest, highest: any one shape, the extremes of what is quantized (0 is added to the range).
    Returns scale > 0 and an integer-valued zero point, both of that shape and dtype.
    """
    # a divisor of the same shape: by a number, CUDA multiplies with its rounded inverse
    steps = torch.full_like(highest, grid.highest)
    if grid.symmetric:
        scale = torch.maximum(highest, -lowest) / steps
        scale = scale.clamp_(min=torch.finfo(scale.dtype).tiny * 2**20)
        return scale, torch.zeros_like(scale)
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scale = (highest - lowest) / steps
    scale = scale.clamp_(min=torch.finfo(scale.dtype).tiny * 2**20)
    return scale, zero_point(lowest, scale)


def zero_point(lowest: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the rounded zero point of a range that starts at `lowest` <= 0."""
    return (-lowest / scale).add_(TIE).round_()


def low_end(lowest: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """Return what entries of a token count for at least, in levels from 0; None: as they are.

    lowest: the least entry before any clipping; it counts for TIE more than it is.
    """
    return None if grid.symmetric else (lowest.clamp(max=0) / scale).add_(TIE)


def encode(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    least: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round x to grid levels, half to even; the result is integer-valued in x's dtype.

    scale, zero and least, the `low_end` of a token, broadcast against x.
    """
    levels = x / scale
    if least is not None:
        torch.maximum(levels, least, out=levels)
    levels.round_()
    if grid.symmetric:
        return levels.clamp_(grid.lowest, grid.highest)
    return levels.add_(zero).clamp_(grid.lowest, grid.highest)


def decode(
    levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the floats that levels stand for: scale·(level - zero)."""
    return levels * scale if grid.symmetric else (levels - zero).mul_(scale)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32 or wider: 16-bit floats cannot hold levels, TIE and scales apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extremes(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View the last dimension in groups and return (grouped x, minimum, maximum per group).

    x: (..., C) with group_size dividing C (0 means C); grouped: (..., C/g, g); the other two
    (..., C/g, 1).
    """
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    # two passes: on CPUs torch.aminmax is eight times slower over the last dimension
    return grouped, grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
