"""NVFP4: groups of 16 numbers of E2M1, each with a scale in E4M3, and a scale of the whole tensor.

The tensor's scale is a float32, and others take the one with which the largest scale of a group is
448. Here it is the power of two above that. So every product of two groups is exact in float32, and
every rounded number in bfloat16. It costs at most one of the eighteen powers of two that E4M3
spans, and no precision above its subnormal numbers. Weights have one for each matrix, inputs one
for each token, which needs no calibration and does not depend on the rest of a batch; or, as other
programs have it, one for all tokens that calibration finds (`CalibratedNVFP4`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from spinlab.formats.base import Parameters, magnitude
from spinlab.formats.integer import nearest
from spinlab.formats.minifloat import (
    E4M3_TOP,
    SMALLEST,
    TOP,
    GroupFloat,
    floor_exponent,
    least_error,
    power_of_two,
    round_e4m3,
    round_mantissa,
)

_FOUR = 8  # the level of 4, which the largest number of a group becomes instead of 6
_TOP_EXPONENT = 8  # of 448
_ROOM = 256.0  # of 448, where the scale of a group may grow from 1/6 of its largest number to 1/4


@dataclass(frozen=True)
class NVFP4(GroupFloat):
    """Scale the largest number of a group to 6, as near as E4M3 comes to that.

    four_over_six: to 4 where that has the smaller squared error (arXiv 2512.02010): the numbers of
    E2M1 lie closest, for their size, up to there. of_nothing: what E4M3 has for a scale that it
    rounds to 0.
    """

    four_over_six: bool = False
    name: ClassVar[str] = "nvfp4"
    group: ClassVar[int] = 16
    of_tensor: ClassVar[bool] = True
    of_nothing: ClassVar[float] = 2.0**-9  # the smallest one

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the level of a group's largest number, or those that are chosen from."""
        return (TOP, _FOUR) if self.four_over_six else (TOP,)

    @property
    def middle(self) -> float | None:
        return None if self.four_over_six else TOP  # a scale is rounded to itself

    @property
    def most(self) -> float:
        """Return how often a tensor's scale fits into its largest number, at most."""
        return 6 * (_ROOM if self.four_over_six else E4M3_TOP)

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        """Return scales as if E4M3 had all exponents, for the tensor is unknown."""
        return self._scaled(magnitude(lowest, highest), None, TOP)

    def choose(
        self,
        x: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        peak: torch.Tensor | None,
    ) -> Parameters:
        tensor = None if peak is None else self._tensor(peak)
        found = [self._scaled(magnitude(lowest, highest), tensor, end) for end in self.ends]
        return least_error(self, x, found, nearest) if self.four_over_six else found[0]

    def _scaled(self, peak: torch.Tensor, tensor: torch.Tensor | None, end: int) -> Parameters:
        """Return half the scale of groups: a level is half a number of E2M1."""
        exact = 2 * peak / torch.full_like(peak, end)
        if tensor is None:
            scale = round_mantissa(exact).clamp(min=SMALLEST) / 2
        else:
            scale = self._stored(exact / tensor) * (tensor / 2)
        return Parameters(scale, torch.zeros_like(scale))

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the number of E4M3 that a group has, for the scale that it would have."""
        found = round_e4m3(scale)
        return torch.where(found == 0, self.of_nothing, found)

    def _tensor(self, peak: torch.Tensor) -> torch.Tensor:
        """Return the scale of a tensor: with it the largest one of its groups still has one."""
        # a divisor of the same shape: by a number, CUDA multiplies with its rounded inverse
        mantissa, exponent = floor_exponent(peak / torch.full_like(peak, self.most))
        return power_of_two(exponent + (mantissa > 1).to(exponent.dtype), peak)

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends; one that chooses may give a smaller range a scale for 4 instead of 6.

        Either scale may have been rounded down, the other up, by 1/16.
        """
        top = self.top * parameters.scale * (1.5 * 1.25 if self.four_over_six else 1)
        return -top, top

    def store_scale(
        self, scale: torch.Tensor, top: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the scales of groups in E4M3, and that of the tensor, float32 (1,).

        It is the smallest in which the largest scale is a number of E4M3. All are then: they were
        so in one that is not smaller. top: the largest scales of several tensors, or of one that is
        a part of what shares a scale, which then has their shape.
        """
        mantissa, exponent = floor_exponent(scale.amax().reshape(1) if top is None else top)
        exponent = exponent + 1 - _TOP_EXPONENT
        tensor = power_of_two(exponent + (mantissa > 1.75).to(exponent.dtype), mantissa)
        groups = (2 * scale / tensor).to(torch.float8_e4m3fn)
        return {"scale": groups, "tensor_scale": tensor.float()}

    def load_scale(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales (out, in/g), float32, behind what `store_scale` returned."""
        return stored["scale"].float() * (stored["tensor_scale"] / 2)


@dataclass(frozen=True)
class CalibratedNVFP4(NVFP4):
    """Have one scale of the tensor for all tokens of an input, from the range that was found there.

    It is what compressed-tensors calls `dynamic: local`, with the same bits: groups have scales of
    their own, up to 448 of the tensor's, beyond which numbers are clipped, and one whose scale is
    rounded to 0 becomes zeros. While nothing is known of the input, each token has its own.
    """

    calibrated: ClassVar[bool] = True
    of_nothing: ClassVar[float] = 2.0**-3  # with which all numbers of the group become 0

    def tensor_scale(self, peak: torch.Tensor) -> torch.Tensor:
        """Return the scale of a tensor, a power of two, of the largest magnitude in it."""
        return self._tensor(peak)
