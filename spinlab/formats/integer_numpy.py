"""Levels of a few rows on a CPU, by numpy, whose calls cost a fraction of torch's.

The torch functions of `spinlab.formats.integer` are the definition: both give the same values bit
for bit, because each step is one correctly rounded operation.
"""

from typing import NamedTuple

import numpy as np
import torch

from spinlab.formats.integer import PARTS, SMALLEST_HALF, Grid, at_least_float32

_FEW = 1 << 14  # numbers up to which calls cost more than the work
_SMALLEST_SCALE = {t: torch.finfo(t).tiny * 2**20 for t in (torch.float32, torch.float64)}
_SMALLEST = _SMALLEST_SCALE[torch.float32]


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


def few_levels(
    x: torch.Tensor, grid: Grid, group_size: int, clip_ratio: float, half_scale: bool = False
) -> FewLevels:
    """Return the levels of x: (..., C), in its dtype or float32 if that is wider.

    group_size divides C, 0 means C. half_scale: the scale is rounded to float16 as the KV codec
    stores it.
    """
    wide = (x if x.dtype in _SMALLEST_SCALE else at_least_float32(x)).numpy(force=True)
    grouped = wide.reshape(*wide.shape[:-1], -1, group_size or wide.shape[-1])
    axis = -1 if (several := grouped.size > grouped.shape[-1]) else None
    # the range contains 0
    lowest = np.minimum.reduce(grouped, axis=axis, keepdims=several, initial=0)
    highest = np.maximum.reduce(grouped, axis=axis, keepdims=several, initial=0)
    if clip_ratio != 1:
        lowest, highest = lowest * clip_ratio, highest * clip_ratio
    span = np.maximum(highest, -lowest) if grid.symmetric else highest - lowest
    scale = np.maximum(span / grid.highest, _SMALLEST_SCALE.get(x.dtype, _SMALLEST))
    if half_scale:
        with np.errstate(over="ignore"):  # infinite, as torch has it
            half = np.maximum(scale, SMALLEST_HALF).astype(np.float16)
        scale = half.astype(wide.dtype)
    levels = _settled(grouped, scale)
    if grid.symmetric:
        zero = np.zeros_like(scale)[()]
    else:
        zero = _settled(-lowest, scale)
        if half_scale:
            zero = np.minimum(zero, grid.highest)
        levels += zero
    np.minimum(levels, grid.highest, out=levels)
    if grid.symmetric or half_scale or clip_ratio != 1:
        # else the range's lowest number is at 0, because the zero point is settled as it is
        np.maximum(levels, grid.lowest, out=levels)
    return FewLevels(levels, scale, zero)


def _settled(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    parts = x / (scale / PARTS)
    out = parts if parts.ndim else None
    parts = np.rint(parts, out=out)
    parts *= 1 / PARTS
    return np.rint(parts, out=out)
