"""The integer format, said once: its NumPy and Triton twins do the same, bit for bit.

The range always contains 0, so the zero point always lies on the grid.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.formats.base import Format, Parameters, Pulled, Rounding

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
HALF_PART = 0.5 / PARTS


def smallest_scale(dtype: torch.dtype) -> float:
    """Return the smallest scale in a dtype of at least 32 bits: its inverse is finite."""
    return torch.finfo(dtype).tiny * 2**20


SMALLEST_HALF = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Code numbers as scale·(level - zero): `bits` in 2..16 and symmetric or not.

    Asymmetric levels are 0..2^b-1 with a rounded zero point, symmetric ones -2^(b-1)..2^(b-1)-1
    with zero point 0. half_scale: scales are those that float16 stores, as in a KV cache.
    """

    bits: int
    symmetric: bool
    half_scale: bool = False
    name: ClassVar[str] = "integer"

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def is_int8(self) -> bool:
        return self.bits <= 8

    @property
    def is_int4(self) -> bool:
        return self.bits <= 4

    @property
    def homogeneous(self) -> bool:
        return not self.half_scale

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        span = torch.maximum(highest, -lowest) if self.symmetric else highest - lowest
        # a divisor of the same shape: by a number, CUDA multiplies with its rounded inverse
        scale = span / torch.full_like(span, self.highest)
        scale = scale.clamp_(min=smallest_scale(scale.dtype))
        if self.half_scale:
            # from float64 by way of float32 everywhere: some devices round once, some twice
            half = scale.clamp_(min=SMALLEST_HALF).to(torch.float32).to(torch.float16)
            scale = half.to(span.dtype)
        if self.symmetric:
            return Parameters(scale, torch.zeros_like(scale))
        zero = settled(-lowest, scale)
        return Parameters(scale, zero.clamp_(0, self.highest) if self.half_scale else zero)

    def encode(self, x: torch.Tensor, parameters: Parameters, rounding: Rounding) -> torch.Tensor:
        levels = rounding(x, parameters.scale)
        if not self.symmetric:
            levels.add_(parameters.zero)
        return levels.clamp_(self.lowest, self.highest)

    def decode(self, levels: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        scale, zero = parameters
        return levels * scale if self.symmetric else (levels - zero).mul_(scale)

    def pull_back(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        rounding: Rounding,
    ) -> Pulled:
        """Pull back as `Format` says, with a zero point that does not move.

        What lies outside is told before rounding, as in LSQ: numbers up to half a step above the
        range become its highest level, and move with it. Nothing does where a scale is as small as
        they are.
        """
        scale, zero = parameters = self.parameters(lowest, highest)
        free = scale > (SMALLEST_HALF if self.half_scale else smallest_scale(scale.dtype))
        steps = self.highest - self.lowest
        bottom = scale * self.lowest if self.symmetric else lowest.clamp(max=0)
        top = bottom + scale * steps
        # of a token whose largest number is a 0, up to noise, all of it is inside
        slack = scale * torch.where(free, HALF_PART, steps)
        # in floats: on a CPU comparisons, and a clamp by tensors, cost many times as much
        above = torch.gt(x, top + slack, out=torch.empty_like(x)).mul_(gradient)
        below = torch.lt(x, bottom - slack, out=torch.empty_like(x)).mul_(gradient)
        passed = (gradient - above).sub_(below)
        error = self.encode(x, parameters, rounding).sub_(zero).sub_(x / scale)
        of_scale, above, below = _sum(error.mul_(passed)) * free, _sum(above), _sum(below)
        if self.symmetric:
            of_peak = (of_scale + self.highest * above + self.lowest * below) / self.highest
            up = (highest >= -lowest).to(of_peak.dtype)
            return Pulled(passed, of_peak * (up - 1), of_peak * up)
        # by as much as the zero point is rounded, the levels of the ends are not the ends
        of_span = (of_scale - (above + below) * (bottom / scale + zero)) / self.highest
        return Pulled(passed, (below - of_span) * (lowest < 0), (above + of_span) * (highest > 0))

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Allow one level for the rounding of the zero points of smaller ranges."""
        scale, zero = parameters
        slack = 0 if self.symmetric else scale
        top, bottom = (self.highest - zero) * scale + slack, (self.lowest - zero) * scale - slack
        return bottom, top


def nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x (..., g) / scale (..., 1) to the nearest integer, half to even, as weights are."""
    return (x / scale).round_()


def settled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x (..., g) / scale (..., 1) to the nearest integer, as activations are.

    What is half within 1/PARTS goes to even.
    PARTS is a power of two: no step but the division and the roundings changes a bit.
    """
    return (x / (scale / PARTS)).round_().mul_(1 / PARTS).round_()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x, of any shape, in float32 or wider: 16-bit floats cannot hold levels and scales."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def extremes(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View the last dimension in groups and return (grouped x, minimum, maximum per group).

    x: (..., C) with group_size dividing C (0 means C); grouped: (..., C/g, g); the other two
    (..., C/g, 1).
    """
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    # two passes: on CPUs torch.aminmax is eight times slower over the last dimension
    return grouped, grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(-1, keepdim=True)
