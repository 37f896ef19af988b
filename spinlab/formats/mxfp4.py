"""MXFP4: groups of 32 numbers of E2M1 that share a power of two (OCP Microscaling, 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.formats.base import Parameters, magnitude
from spinlab.formats.integer import nearest
from spinlab.formats.minifloat import (
    GroupFloat,
    e8m0_of,
    floor_exponent,
    least_error,
    power_of_two,
    powers_of,
)

_E2M1 = 2  # the exponent of its largest number


@dataclass(frozen=True)
class MXFP4(GroupFloat):
    """Share the scale 2^(⌊log2 max|x|⌋ - 2), so that the largest number is 4 to 8 of it.

    up_from: what max|x| must be, over the power of two below it, for a scale twice as large. With
    2, never, it is the specification's scale, which clips to 6 what lies above it. With 1.75 only
    what would be rounded to 6 anyway is clipped, as compressed-tensors has it. None: of the two the
    one with the smaller squared error, the first where they are equal.
    """

    up_from: float | None = 1.75
    name: ClassVar[str] = "mxfp4"
    group: ClassVar[int] = 32

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        return self._scaled(magnitude(lowest, highest), self.up_from or 2.0)

    def choose(
        self,
        x: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        peak: torch.Tensor | None,
    ) -> Parameters:
        if self.up_from is not None:
            return self.parameters(lowest, highest)
        both = [self._scaled(magnitude(lowest, highest), up_from) for up_from in (2.0, 1.0)]
        return least_error(self, x, both, nearest)

    def _scaled(self, peak: torch.Tensor, up_from: float) -> Parameters:
        """Return half the scale: a level is half a number of E2M1."""
        mantissa, exponent = floor_exponent(peak)
        exponent = exponent - _E2M1 - 1 + (mantissa >= up_from).to(exponent.dtype)
        scale = power_of_two(exponent, peak)
        return Parameters(scale, torch.zeros_like(scale))

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends; one that chooses may give a smaller range the scale that it left."""
        top = self.highest * parameters.scale * (2 if self.up_from is None else 1)
        return -top, top

    def store_scale(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the exponents as E8M0 has them, a byte to a group."""
        return {"scale": e8m0_of(2 * scale)}

    def load_scale(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales (out, in/g), float32, behind stored bytes."""
        return powers_of(stored["scale"]) / 2
