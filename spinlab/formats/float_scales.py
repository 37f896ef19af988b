"""What the kernels of small floats make of the largest magnitude of a group: its scale.

`spinlab.formats.microscaling`, `spinlab.formats.nvfp4` and `FP8` are the definition. Numbers of
groups are (n, 1); KIND is a `Kind` of `spinlab.formats.float_triton`.
"""
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

import math

import torch
import triton
import triton.language as tl

from spinlab.formats.integer import smallest_scale
from spinlab.formats.integer_kernels import even

_SMALLEST = tl.constexpr(smallest_scale(torch.float32))
_LEAST = tl.constexpr(round(math.log2(_SMALLEST.value)))  # its exponent
_E4M3_LOWEST = tl.constexpr(-6)
_E4M3_TOP = tl.constexpr(448.0)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power(exponent):
    """Return 2^exponent, for exponents of normal numbers."""
    return float_of((exponent + 127) << 23)


@triton.jit
def _exponent(x):
    """Return ⌊log2 x⌋ of x >= 0: -127 below normal numbers, -1 of 0 as `floor_exponent` has it."""
    return tl.where(bits_of(x) == 0, -1, (bits_of(x) >> 23) - 127)


@triton.jit
def _mantissa(x):
    """Return x / 2^⌊log2 x⌋ of a normal x > 0, and 0 of 0."""
    return tl.where(bits_of(x) == 0, 0.0, float_of((bits_of(x) & 0x7FFFFF) | 0x3F800000))


@triton.jit
def floored(x):
    """Return x, but not less than what a scale may be; NaN stays NaN."""
    return tl.where(x < _SMALLEST, _SMALLEST, x)


@triton.jit
def _three_bits(x, LOWEST: tl.constexpr):
    """Do what `round_mantissa` does; below LOWEST the last bit stays where it is."""
    exponent = tl.maximum(_exponent(x), LOWEST)
    return even(x * power(3 - exponent)) * power(exponent - 3)


@triton.jit
def most_of(x):
    """Return the bits of the largest magnitude of each row: (n, 1). NaN counts as more than all."""
    return tl.max(bits_of(x) & 0x7FFFFFFF, 1, keep_dims=True)


@triton.jit
def _microscale(peak, UP_FROM: tl.constexpr, KIND: tl.constexpr):
    """Do what `Microscaled` does for groups whose largest magnitude is peak."""
    exponent = _exponent(peak) + tl.where(_mantissa(peak) >= UP_FROM, 1, 0) - KIND.last
    return power(tl.maximum(exponent, _LEAST)) + (peak - peak)


@triton.jit
def _tensor_scale(peak, KIND: tl.constexpr):
    """Return `NVFP4`'s scale of a tensor whose largest magnitude is peak."""
    ratio = tl.math.div_rn(peak, tl.full(peak.shape, KIND.most, tl.float32))
    exponent = _exponent(ratio) + tl.where(_mantissa(ratio) > 1, 1, 0)
    return power(tl.maximum(exponent, _LEAST)) + (peak - peak)


@triton.jit
def _e4m3_scale(peak, tensor, END: tl.constexpr, KIND: tl.constexpr):
    """Return `NVFP4`'s scale of groups, in a tensor whose scale is known where KIND has `most`."""
    exact = tl.math.div_rn(2 * peak, tl.full(peak.shape, END, tl.float32))
    if KIND.most is None:
        # any exponent far below that of the smallest scale
        return floored(_three_bits(exact, -120)) * 0.5
    else:
        found = _three_bits(tl.math.div_rn(exact, tensor), _E4M3_LOWEST)
        found = tl.where(found > _E4M3_TOP, _E4M3_TOP, found)
        return tl.where(found == 0, KIND.of_nothing, found) * (tensor * 0.5)


@triton.jit
def group_scale(peak, shared, RULE: tl.constexpr, KIND: tl.constexpr):
    """Return the scales of groups by one of KIND's rules."""
    if KIND.powers:
        return _microscale(peak, RULE, KIND)
    else:
        return _e4m3_scale(peak, shared, RULE, KIND)


@triton.jit
def token_scale(peak, KIND: tl.constexpr):
    """Return what the groups of a token share: the scale of a tensor or, as in FP8, its own."""
    if KIND.most is not None:
        return _tensor_scale(peak, KIND)
    else:
        scale = tl.math.div_rn(peak, tl.full(peak.shape, KIND.top, tl.float32))
        return floored(scale) + (peak - peak)
