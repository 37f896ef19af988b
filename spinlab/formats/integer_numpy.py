"""The integer format of a few rows on a CPU, by numpy, whose calls cost a fraction of torch's.

`spinlab.formats.integer` is the definition: both give the same values bit for bit, because each
step is one correctly rounded operation.
"""

from typing import NamedTuple

import numpy as np
import torch

from spinlab.formats.integer import (
    PARTS,
    SMALLEST_HALF,
    IntegerFormat,
    at_least_float32,
    smallest_scale,
)

_FEW = 1 << 14  # numbers up to which calls cost more than the work
_SMALLEST_SCALE = {t: smallest_scale(t) for t in (torch.float32, torch.float64)}


class FewLevels(NamedTuple):
    """Hold integer-valued levels (..., C/g, g) with scale and zero (..., C/g, 1).

    Where there is but one group, scale and zero have no dimensions: numpy counts faster with them.
    """

    levels: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def decode(self) -> np.ndarray:
        """Return the floats that the levels stand for: scale·(level - zero)."""
        numbers = self.levels - self.zero
        numbers *= self.scale
        return numbers


def are_few(x: torch.Tensor) -> bool:
    """Tell whether x is a few numbers in the host's memory."""
    return x.is_cpu and 0 < x.numel() <= _FEW


def round_rows(
    x: torch.Tensor,
    format: IntegerFormat,
    group_size: int,
    clip_ratio: float | torch.Tensor,
    error: bool = False,
) -> torch.Tensor:
    """Return Q(x), or Q(x) - x with `error`, for x: (..., C) in groups of C, in x's dtype."""
    found = few_levels(x, format, group_size, float(clip_ratio)).decode()
    rounded = torch.from_numpy(found).view(x.shape)
    return (rounded.sub_(x) if error else rounded).to(x.dtype)


def few_levels(
    x: torch.Tensor, format: IntegerFormat, group_size: int, clip_ratio: float
) -> FewLevels:
    """Return the levels of x: (..., C), in its dtype or float32 if that is wider.

    group_size divides C, 0 means C.
    """
    wide = x if x.dtype in _SMALLEST_SCALE else at_least_float32(x)
    smallest = _SMALLEST_SCALE[wide.dtype]
    wide = wide.numpy(force=True)
    grouped = wide.reshape(*wide.shape[:-1], -1, group_size or wide.shape[-1])
    axis = -1 if (several := grouped.size > grouped.shape[-1]) else None
    # the range contains 0
    lowest = np.minimum.reduce(grouped, axis=axis, keepdims=several, initial=0)
    highest = np.maximum.reduce(grouped, axis=axis, keepdims=several, initial=0)
    if clip_ratio != 1:
        lowest, highest = lowest * clip_ratio, highest * clip_ratio
    with np.errstate(over="ignore", invalid="ignore"):  # infinite or no number, as torch has it
        scale, zero = _parameters(lowest, highest, format, smallest)
        levels = _settled(grouped, scale)
    if not format.symmetric:
        levels += zero
    np.minimum(levels, format.highest, out=levels)
    if format.symmetric or format.half_scale or clip_ratio != 1:
        # else the range's lowest number is at 0, because the zero point is settled as it is
        np.maximum(levels, format.lowest, out=levels)
    return FewLevels(levels, scale, zero)


def _parameters(
    lowest: np.ndarray, highest: np.ndarray, format: IntegerFormat, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    span = np.maximum(highest, -lowest) if format.symmetric else highest - lowest
    scale = np.maximum(span / format.highest, smallest)
    if format.half_scale:
        half = np.maximum(scale, SMALLEST_HALF).astype(np.float32).astype(np.float16)
        scale = half.astype(span.dtype)
    if format.symmetric:
        return scale, np.zeros_like(scale)[()]
    zero = _settled(-lowest, scale)
    return scale, np.minimum(zero, format.highest) if format.half_scale else zero


def _settled(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    parts = x / (scale / PARTS)
    out = parts if parts.ndim else None
    parts = np.rint(parts, out=out)
    parts *= 1 / PARTS
    return np.rint(parts, out=out)
