"""Scales of MX formats: groups of 32 numbers share a power of two (OCP Microscaling, 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.formats.base import Parameters, magnitude
from spinlab.formats.integer import nearest
from spinlab.formats.minifloat import (
    ScaledFloat,
    e8m0_of,
    floor_exponent,
    least_error,
    power_of_two,
    powers_of,
)


@dataclass(frozen=True)
class Microscaled(ScaledFloat):
    """Share the scale 2^(⌊log2 max|x|⌋ - e), with e the exponent of the largest float.

    up_from: what max|x| must be, over the power of two below it, for a scale twice as large. With
    2, never, it is the specification's scale, which clips what lies above the largest float. A
    format has a number of its own here, with which only what would be rounded to that float anyway
    is clipped. None: of the two the one with the smaller squared error, the first where they are
    equal.
    """

    up_from: float | None
    group: ClassVar[int] = 32

    @property
    def rules(self) -> tuple[float, ...]:
        """Return up_from, or those numbers whose scales are chosen from, the first before others.

        With 1, any max|x| above 0 has the larger scale.
        """
        return (2.0, 1.0) if self.up_from is None else (self.up_from,)

    @property
    def middle(self) -> float | None:
        return None if self.up_from is None else self.up_from * 2 ** (self.last - 0.5)

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        return self._scaled(magnitude(lowest, highest), self.rules[0])

    def choose(
        self,
        x: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        peak: torch.Tensor | None,
    ) -> Parameters:
        found = [self._scaled(magnitude(lowest, highest), up_from) for up_from in self.rules]
        return least_error(self, x, found, nearest) if self.up_from is None else found[0]

    def _scaled(self, peak: torch.Tensor, up_from: float) -> Parameters:
        mantissa, exponent = floor_exponent(peak)
        exponent = exponent - self.last + (mantissa >= up_from).to(exponent.dtype)
        scale = power_of_two(exponent, peak)
        return Parameters(scale, torch.zeros_like(scale))

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends; one that chooses may give a smaller range the scale that it left."""
        top = self.top * parameters.scale * (2 if self.up_from is None else 1)
        return -top, top

    def store_scale(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the exponents as E8M0 has them, a byte to a group."""
        return {"scale": e8m0_of(self.unit * scale)}

    def load_scale(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales (out, in/g), float32, behind stored bytes."""
        return powers_of(stored["scale"]) / self.unit
