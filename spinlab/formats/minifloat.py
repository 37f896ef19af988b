"""Floats of a few bits: rounding to them, and to E8M0 and E4M3 scales (OCP, 2023).

A number of E2M1 is held as its double, a whole number: 0, 1, 2, 3, 4, 6, 8 or 12, and its sign. So
a group is scale·level as on an integer grid, with a scale that is half of what a file holds, and
products of groups are integers. Wider floats are held as their codes (`spinlab.formats.coded`).
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.errors import InputError
from spinlab.formats.base import Format, Parameters, Pulled, Rounding, magnitude
from spinlab.formats.integer import smallest_scale
from spinlab.formats.pack import pack_nibbles, unpack_nibbles

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the numbers of E2M1, by their code
TOP = MAGNITUDES[-1]
E4M3_TOP = 448.0
_BIAS = 127  # of E8M0
_E4M3_LOWEST = -6  # the exponent of the smallest normal number
# float32's in every dtype: a network in float64 codes what it stands for
SMALLEST = smallest_scale(torch.float32)


@dataclass(frozen=True)
class ScaledFloat(Format):
    """Code groups of numbers as small floats times a scale that the group shares.

    width: the bits of such a float. mantissa: those of them behind the leading one. smallest: the
    exponent of the smallest normal float; those below it have its last bit. top: the largest. Both
    in units of a scale. unit: what a scale is smaller by than the one that files hold.
    """

    bits: int
    symmetric: bool
    width: ClassVar[int]
    mantissa: ClassVar[int]
    smallest: ClassVar[int]
    top: ClassVar[float]
    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if (self.bits, self.symmetric) != (self.width, True):
            raise InputError(
                f"{self.name} has {self.width} bits and no zero points: bits={self.width} "
                "symmetric=true, or another format"
            )

    @property
    def last(self) -> int:
        """Return the exponent of the largest float, in units of a scale."""
        return math.frexp(self.top)[1] - 1

    @property
    def middle(self) -> float | None:
        """Return the range, in scales, in the middle of those that have the same scale.

        None where scales come in no steps, or the numbers of a group have a say in its own.
        """
        return None

    def centred(
        self, ratio: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor
    ) -> torch.Tensor:
        if self.middle is None:
            return ratio
        scale = self.parameters(lowest * ratio, highest * ratio).scale
        return (self.middle * scale / magnitude(lowest, highest)).clamp(max=1)  # of zeros 1

    @abstractmethod
    def _step(self, size: torch.Tensor) -> torch.Tensor:
        """Return how far floats lie apart around magnitudes, in units of a scale."""

    def _placed(self, x: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        """Return x, rounded, in units of its scale; what lies outside is not clipped."""
        step = self._step((x / scale).abs_())
        return rounding(x, scale * step).mul_(step)

    def pull_back(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        rounding: Rounding,
    ) -> Pulled:
        """Pull back as `Format` says; how a scale is rounded counts as a factor that stays.

        What lies outside is told before rounding: floats up to 7 scales become 6 in E2M1, whose
        last step is that wide, and move with it.
        """
        parameters = self.choose(x, lowest, highest, None)
        exact = x / parameters.scale
        kept = self._placed(x, parameters.scale, rounding).clamp_(-self.top, self.top)
        inside = exact.abs() <= self.top
        of_scale = gradient * torch.where(inside, kept - exact, kept)
        peak, up = magnitude(lowest, highest), highest >= -lowest
        factor = parameters.scale / peak.clamp(min=SMALLEST)
        of_peak = of_scale.sum(-1, keepdim=True) * factor
        return Pulled(gradient * inside, -of_peak * ~up, of_peak * up)

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        return -self.top * parameters.scale, self.top * parameters.scale


@dataclass(frozen=True)
class GroupFloat(ScaledFloat):
    """Code groups of `group` numbers as E2M1: levels are doubles of its numbers."""

    width: ClassVar[int] = 4
    mantissa: ClassVar[int] = 1
    smallest: ClassVar[int] = 1
    top: ClassVar[float] = TOP
    unit: ClassVar[int] = 2

    @property
    def lowest(self) -> int:
        return -TOP

    @property
    def highest(self) -> int:
        return TOP

    @property
    def is_int8(self) -> bool:
        return True

    def _step(self, size: torch.Tensor) -> torch.Tensor:
        """Return 1, 2 or 4."""
        return 1 + (size >= 4).to(size.dtype) + 2 * (size >= 8).to(size.dtype)

    def encode(self, x: torch.Tensor, parameters: Parameters, rounding: Rounding) -> torch.Tensor:
        return self._placed(x, parameters.scale, rounding).clamp_(-TOP, TOP)

    def decode(self, levels: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return levels * parameters.scale

    def pack(self, levels: torch.Tensor) -> torch.Tensor:
        return pack_nibbles(codes_of(levels))

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        return levels_of(unpack_nibbles(packed, signed=False)[..., :n])


def codes_of(levels: torch.Tensor) -> torch.Tensor:
    """Return the E2M1 codes, 0..15, of levels: uint8 of the same shape. A zero has no sign."""
    size = levels.abs().to(torch.uint8)
    code = torch.minimum(torch.minimum(size, (size >> 1) + 2), (size >> 2) + 4)
    return code | ((levels < 0).to(torch.uint8) << 3)


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    """Return the levels of E2M1 codes 0..15: int8 of the same shape."""
    # by arithmetic: a table would come from the host, which no CUDA graph takes. No `where`, which
    # on a CPU takes bytes one by one
    signed = codes.to(torch.int8)
    code = signed & 7
    size = torch.maximum(torch.maximum(code, 2 * code - 4), 8 * code - 44)
    return size * (1 - (signed >> 2 & 2))


def floor_exponent(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m in 1..2 and whole e with x = m·2^e, exactly, for x > 0."""
    mantissa, exponent = torch.frexp(x)
    return mantissa * 2, exponent - 1


def power_of_two(exponent: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent, not below SMALLEST, in the dtype of `like`; NaN where that is no number.

    exponent: whole.
    """
    return whole_power(exponent).to(like.dtype).clamp(min=SMALLEST) + (like - like)


def e8m0_of(powers: torch.Tensor) -> torch.Tensor:
    """Return the bytes of E8M0 that stand for powers of two."""
    return (floor_exponent(powers)[1] + _BIAS).to(torch.uint8)


def powers_of(e8m0: torch.Tensor) -> torch.Tensor:
    """Return the powers of two, float32, that bytes of E8M0 stand for; NaN for 255.

    A byte is the exponent of a float32, but for 0, which there is a half of 1, and 255.
    """
    code = e8m0.to(torch.int32)
    return (code << 23 | (code % 255 == 0).to(torch.int32) << 22).view(torch.float32)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round x >= 0 to the nearest number of E4M3, half to even; above 448 it is 448."""
    return round_mantissa(x, _E4M3_LOWEST).clamp(max=E4M3_TOP)


def round_mantissa(x: torch.Tensor, lowest: int | None = None) -> torch.Tensor:
    """Round x >= 0 to three bits behind the leading one, half to even.

    lowest: the exponent below which the last bit stays where it is, if there is one.
    """
    _, exponent = floor_exponent(x)
    exponent = exponent if lowest is None else exponent.clamp(min=lowest)
    return (x * whole_power(3 - exponent)).round_() * whole_power(exponent - 3)


def whole_power(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent in float32, put together from its bits: a library's may be off by one.

    exponent: whole; beyond those of normal numbers the nearest of them.
    """
    bits = exponent.to(torch.int32).clamp(-126, 127) + _BIAS
    return (bits << 23).view(torch.float32)


def least_error(
    format: Format, x: torch.Tensor, candidates: list[Parameters], rounding: Rounding
) -> Parameters:
    """Return, group by group of x (..., g), what codes it with the smallest squared error.

    A tie goes to the earlier candidate. Errors are added up in an order that is the same on every
    device: two that nearly tie would else be chosen from by how a library sums.
    """
    best, *others = candidates
    smallest = _error(format, x, best, rounding)
    for other in others:
        error = _error(format, x, other, rounding)
        better = error < smallest
        best = Parameters(*(torch.where(better, b, a) for a, b in zip(best, other, strict=True)))
        smallest = torch.where(better, error, smallest)
    return best


def _error(
    format: Format, x: torch.Tensor, parameters: Parameters, rounding: Rounding
) -> torch.Tensor:
    found = format.decode(format.encode(x, parameters, rounding), parameters)
    return sum_of_pairs(found.sub_(x).square_())


def sum_of_pairs(x: torch.Tensor) -> torch.Tensor:
    """Add up neighbours of the last dimension, then neighbouring sums, until there is one."""
    while (width := x.shape[-1]) > 1:
        paired = x[..., : width - 1 : 2] + x[..., 1::2]
        x = torch.cat((paired, x[..., -1:]), -1) if width % 2 else paired
    return x
