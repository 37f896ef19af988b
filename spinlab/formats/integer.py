"""Affine integer arithmetic, said once: every quantizer, codec and kernel of spinlab uses these.

Asymmetric grids hold 0..2^b-1 with a rounded zero point, symmetric ones -2^(b-1)..2^(b-1)-1 with
zero point 0. The range always contains 0, so the zero point always lies on the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spinlab.config import TensorQuant

Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Weights lie between levels by chance. Activations and zero points also lie exactly half-way by
# structure, where float noise would choose the side and every flip would spread:
# - A massive token is nearly c·e_j, and a Hadamard rotation spreads it to ±c/sqrt(n) in every
#   channel. Then min = -max, the asymmetric zero point is 7.5 and the entries are at ±7.5.
# - A token that attends to one token alone takes over its value, whose numbers are levels already.
#   If they fill 14 of 15 steps, the next quantizer finds level 7 at 7·15/14 = 7.5.
# So they are rounded to one of PARTS parts of a level first: whatever lies within half a part of a
# tie, from either side, is on it, and goes to the even neighbour. That is stable, and has no bias,
# because it is up as often as down. The cost: one number in 2·PARTS takes a neighbour that is up to
# a part farther than the other. Half a part is far above the noise of float32 at 128 levels, 2^-17.
# And numbers that are quantized twice lie at j/m of a level, m <= 255: those next to a tie are at
# least 1/510 away from it, and half a part, half as far, is not near any of them.
PARTS = 2.0**9

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


def weight_grid(format: TensorQuant) -> Grid:
    """Return the levels of a weight's format."""
    return Grid(format.bits, format.symmetric)


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
    return settled(-lowest, scale)


def nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x / scale to the nearest integer, half to even: the rule of weights."""
    return (x / scale).round_()


def settled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x / scale to the nearest integer, what is about half to even: the rule of activations.

    PARTS is a power of two: no step but the division and the roundings changes a bit.
    """
    return (x / (scale / PARTS)).round_().mul_(1 / PARTS).round_()


def encode(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, rounding: Rounding
) -> torch.Tensor:
    """Turn x into grid levels by a rule, `nearest` or `settled`; integer-valued, in x's dtype.

    scale and zero broadcast against x.
    """
    levels = rounding(x, scale)
    if grid.symmetric:
        return levels.clamp_(grid.lowest, grid.highest)
    return levels.add_(zero).clamp_(grid.lowest, grid.highest)


def decode(
    levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the floats that levels stand for: scale·(level - zero)."""
    return levels * scale if grid.symmetric else (levels - zero).mul_(scale)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32 or wider: 16-bit floats cannot hold levels, their parts and scales."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extremes(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View the last dimension in groups and return (grouped x, minimum, maximum per group).

    x: (..., C) with group_size dividing C (0 means C); grouped: (..., C/g, g); the other two
    (..., C/g, 1).
    """
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    # two passes: on CPUs torch.aminmax is eight times slower over the last dimension
    return grouped, grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
