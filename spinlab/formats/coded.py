"""Floats of 6 and 8 bits, whose levels are their codes: E2M3, E3M2 and E4M3 (OCP, 2023).

A code counts the floats from 0 on, so that a level is ± the place of its magnitude among them. The
floats themselves, as whole numbers, would be too wide for integer kernels: they are multiplied as
floats.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.formats.base import Parameters, Rounding, magnitude
from spinlab.formats.microscaling import Microscaled
from spinlab.formats.minifloat import SMALLEST, ScaledFloat, floor_exponent, whole_power
from spinlab.formats.pack import pack_levels, unpack_levels


@dataclass(frozen=True)
class CodedFloat(ScaledFloat):
    """Code numbers by the places of floats. codes: the place of the largest."""

    codes: ClassVar[int]

    @property
    def lowest(self) -> int:
        return -self.codes

    @property
    def highest(self) -> int:
        return self.codes

    def _step(self, size: torch.Tensor) -> torch.Tensor:
        return whole_power(self._exponent(size) - self.mantissa).to(size.dtype)

    def _exponent(self, size: torch.Tensor) -> torch.Tensor:
        """Return the exponents of magnitudes, whole and not below the smallest."""
        return floor_exponent(size.clamp(min=2.0**self.smallest))[1]

    def encode(self, x: torch.Tensor, parameters: Parameters, rounding: Rounding) -> torch.Tensor:
        placed = self._placed(x, parameters.scale, rounding).clamp_(-self.top, self.top)
        size = placed.abs()
        exponent = self._exponent(size)
        # a code is the mantissa as a whole number, behind those of all smaller exponents
        code = size * whole_power(self.mantissa - exponent)
        code += (exponent - self.smallest) * (1 << self.mantissa)
        return code.copysign_(placed)

    def decode(self, levels: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        code = levels.abs().to(torch.int32)
        above = (code >> self.mantissa).clamp(min=1) - 1  # exponents below this one
        whole = (code - (above << self.mantissa)).to(levels.dtype)
        size = whole * whole_power(above + self.smallest - self.mantissa).to(levels.dtype)
        return size.copysign_(levels) * parameters.scale

    def pack(self, levels: torch.Tensor) -> torch.Tensor:
        """Return sign and magnitude. A zero has no sign."""
        code = levels.abs().to(torch.uint8) | ((levels < 0).to(torch.uint8) << self.bits - 1)
        return pack_levels(code, self.bits, 0)

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        code = unpack_levels(packed, self.bits, n, 0)
        place = self.bits - 1  # of the sign
        size = (code & (1 << place) - 1).to(torch.int8)
        return size * (1 - 2 * (code >> place).to(torch.int8))  # `where` takes bytes one by one


@dataclass(frozen=True)
class E2M3(CodedFloat):
    """Floats up to 7.5."""

    width: ClassVar[int] = 6
    top: ClassVar[float] = 7.5
    mantissa: ClassVar[int] = 3
    smallest: ClassVar[int] = 0
    codes: ClassVar[int] = 31


@dataclass(frozen=True)
class E3M2(CodedFloat):
    """Floats up to 28."""

    width: ClassVar[int] = 6
    top: ClassVar[float] = 28.0
    mantissa: ClassVar[int] = 2
    smallest: ClassVar[int] = -2
    codes: ClassVar[int] = 31


@dataclass(frozen=True)
class E4M3(CodedFloat):
    """Floats up to 448; the code above that is NaN."""

    width: ClassVar[int] = 8
    top: ClassVar[float] = 448.0
    mantissa: ClassVar[int] = 3
    smallest: ClassVar[int] = -6
    codes: ClassVar[int] = 126


@dataclass(frozen=True)
class MXFP6E2M3(Microscaled, E2M3):
    """Scale the largest number to 4 to 8; from 7.75 on it would not be rounded to 7.5."""

    up_from: float | None = 7.75 / 4
    name: ClassVar[str] = "mxfp6_e2m3"


@dataclass(frozen=True)
class MXFP6E3M2(Microscaled, E3M2):
    """Scale the largest number to 16 to 32; from 30 on it would not be rounded to 28."""

    up_from: float | None = 30 / 16
    name: ClassVar[str] = "mxfp6_e3m2"


@dataclass(frozen=True)
class MXFP8(Microscaled, E4M3):
    """Scale the largest number to 256 to 512; from 464 on it would not be rounded to 448."""

    up_from: float | None = 464 / 256
    name: ClassVar[str] = "mxfp8"


@dataclass(frozen=True)
class FP8(E4M3):
    """Scale the largest number of a token, a channel or a group to 448: float32 scales."""

    name: ClassVar[str] = "fp8"

    @property
    def homogeneous(self) -> bool:
        return True

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        peak = magnitude(lowest, highest)
        # a divisor of the same shape: by a number, CUDA multiplies with its rounded inverse
        scale = (peak / torch.full_like(peak, self.top)).clamp(min=SMALLEST)
        # NaN where the largest is infinite: 0 times that has no level
        scale = self.store_scale(scale)["scale"].to(peak.dtype) + (peak - peak)
        return Parameters(scale, torch.zeros_like(scale))

    def store_scale(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scale": scale.to(torch.float32)}
