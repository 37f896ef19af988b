"""Quantize what comes in token by token: ranges from the numbers themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spinlab.errors import InputError
from spinlab.formats.integer import (
    Grid,
    at_least_float32,
    decode,
    encode,
    extremes,
    scale_and_zero,
    settled,
)
from spinlab.formats.integer_numpy import FewLevels, few_levels
from spinlab.formats.integer_triton import has_kernel, round_rows


class Encoded(NamedTuple):
    """Hold integer-valued levels (..., C/g, g) with scale and zero (..., C/g, 1)."""

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class TokenQuantizer:
    """Quantize the last dimension dynamically, per token and group (0 = whole token).

    The range is min..max of the group, shrunk by clip_ratio, and always contains 0. A ratio that
    is being learned is a tensor of no dimensions, on the device of what is quantized.
    """

    grid: Grid
    group_size: int = 0
    clip_ratio: float | torch.Tensor = 1.0

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C)."""
        grouped, lowest, highest = extremes(at_least_float32(x), self.group_size)
        ends = lowest, highest
        if isinstance(self.clip_ratio, torch.Tensor) or self.clip_ratio != 1:
            ends = lowest * self.clip_ratio, highest * self.clip_ratio
        scale, zero = scale_and_zero(*ends, self.grid)
        return Encoded(encode(grouped, scale, zero, self.grid, settled), scale, zero)

    def to_bytes(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C) on a grid of at most 8 bits, moved to start at 0.

        Levels are uint8, zero points, moved as well, int32.
        """
        levels, scale, zero = self.encode(x)
        if self.grid.lowest:
            levels, zero = levels - self.grid.lowest, zero - self.grid.lowest
        return Encoded(levels.to(torch.uint8), scale, zero.to(torch.int32))

    def to_few_bytes(self, x: torch.Tensor) -> FewLevels:
        """Return what `to_bytes` does for a few numbers in the host's memory, in numpy."""
        levels, scale, zero = few_levels(x, self.grid, self.group_size, float(self.clip_ratio))
        if self.grid.lowest:
            levels, zero = levels - self.grid.lowest, zero - self.grid.lowest
        return FewLevels(levels.astype(np.uint8), scale, zero.astype(np.int32))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Return the floats (..., C) that encoded levels stand for, in the scale's dtype."""
        return decode(*encoded, self.grid).flatten(-2)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), with a straight-through gradient."""
        return StraightThrough.apply(x, self.round_trip)  # type: ignore[no-any-return]

    def error(self, x: torch.Tensor) -> torch.Tensor:
        """Return Q(x) - x: (..., C), without a gradient."""
        if has_kernel(x):
            return round_rows(x, self.grid, self.group_size, self.clip_ratio, error=True)
        return self.decode(self.encode(x)).sub_(x).to(x.dtype)

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), without a gradient."""
        if has_kernel(x):
            return round_rows(x, self.grid, self.group_size, self.clip_ratio)
        return self.decode(self.encode(x)).to(x.dtype)


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
