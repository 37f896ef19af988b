"""Quantize what comes in token by token: ranges from the numbers themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spinlab.errors import InputError
from spinlab.formats.base import Format, Parameters, peak_of
from spinlab.formats.integer import at_least_float32, extremes, settled
from spinlab.formats.integer_numpy import FewLevels
from spinlab.formats.twins import twin_of


class Encoded(NamedTuple):
    """Hold integer-valued levels (..., C/g, g) with scale and zero (..., C/g, 1)."""

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class TokenQuantizer:
    """Quantize the last dimension dynamically, per token and group (0 = whole token).

    The range is min..max of the group, shrunk by clip_ratio, and always contains 0. A ratio that
    is being learned is a tensor of no dimensions, on the device of what is quantized. peak: the
    largest magnitude of the input, for a format that has it from calibration.
    """

    format: Format
    group_size: int = 0
    clip_ratio: float | torch.Tensor = 1.0
    peak: float | None = None

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C)."""
        grouped, lowest, highest = extremes(at_least_float32(x), self.group_size)
        if isinstance(self.clip_ratio, torch.Tensor) or self.clip_ratio != 1:
            lowest, highest = lowest * self.clip_ratio, highest * self.clip_ratio
        peak = peak_of(self.format, lowest, highest, (-2,))  # of a token
        if peak is not None and self.peak is not None:
            peak = torch.full_like(peak, self.peak)
        parameters = self.format.choose(grouped, lowest, highest, peak)
        return Encoded(self.format.encode(grouped, parameters, settled), *parameters)

    def to_bytes(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C) in a format that is_int8, moved to start at 0.

        Levels are uint8, zero points, moved as well, int32.
        """
        if encode_rows := twin_of(self.format, x).encode_rows:
            return Encoded(*encode_rows(x, *self._of_twins, **self._peak_of_twins))
        levels, scale, zero = self.encode(x)
        if lowest := self.format.lowest:
            levels, zero = levels - lowest, zero - lowest
        return Encoded(levels.to(torch.uint8), scale, zero.to(torch.int32))

    def takes_few(self, x: torch.Tensor) -> bool:
        """Tell whether `few` and `to_few_bytes` take x: a few numbers in the host's memory."""
        return twin_of(self.format, x).few_levels is not None

    def few(self, x: torch.Tensor) -> FewLevels:
        """Return what `encode` does for x: (..., C), in numpy."""
        few_levels = twin_of(self.format, x).few_levels
        assert few_levels is not None, "ask takes_few first"
        return few_levels(x, self.format, self.group_size, float(self.clip_ratio))

    def to_few_bytes(self, x: torch.Tensor) -> FewLevels:
        """Return what `to_bytes` does for x: (..., C), in numpy."""
        levels, scale, zero = self.few(x)
        if lowest := self.format.lowest:
            levels, zero = levels - lowest, zero - lowest
        return FewLevels(levels.astype(np.uint8), scale, zero.astype(np.int32))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Return the floats (..., C) that encoded levels stand for, in the scale's dtype."""
        levels, *parameters = encoded
        return self.format.decode(levels, Parameters(*parameters)).flatten(-2)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), with a straight-through gradient."""
        return StraightThrough.apply(x, self.round_trip)  # type: ignore[no-any-return]

    def error(self, x: torch.Tensor) -> torch.Tensor:
        """Return Q(x) - x: (..., C), without a gradient."""
        if round_rows := twin_of(self.format, x).round_rows:
            return round_rows(x, *self._of_twins, error=True, **self._peak_of_twins)
        return self.decode(self.encode(x)).sub_(x).to(x.dtype)

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), without a gradient."""
        if round_rows := twin_of(self.format, x).round_rows:
            return round_rows(x, *self._of_twins, **self._peak_of_twins)
        return self.decode(self.encode(x)).to(x.dtype)

    @property
    def _of_twins(self) -> tuple[Format, int, float | torch.Tensor]:
        """Return what every twin is told."""
        return self.format, self.group_size, self.clip_ratio

    @property
    def _peak_of_twins(self) -> dict[str, float]:
        """Return what those are told beside it whose format depends on a tensor that is known."""
        if self.peak is None or not self.format.of_tensor:
            return {}
        return {"peak": self.peak}


def check_group(setting: str, group_size: int, width: int, where: str) -> None:
    """Raise InputError where groups do not tile a dimension."""
    if group_size and width % group_size:
        raise InputError(f"{setting}={group_size} does not divide {width}, the input of {where}")


class StraightThrough(torch.autograd.Function):
    """Apply a rounding function and pass the gradient on unchanged (Bengio et al. 2013).

    As in SpinQuant's published recipe the gradient is not masked where values were clipped and
    does not reach scale and zero point.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]):
        return rounding(x.detach())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None
