"""The Triton kernel that gates, rotates by Hadamard factors and quantizes whole tokens on chip."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.formats.integer_kernels import parameters_of
from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.producers.triton import gated, levels_of


@triton.jit
def _rows(
    gate_ptr, up_ptr, START: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Load SIZE of the ROWS rows of a token, transposed: (BLOCK, SIZE), zeros outside."""
    a = START + tl.arange(0, SIZE)[:, None]
    b = tl.arange(0, BLOCK)[None, :]
    inside = (a < ROWS) & (b < B)
    x = tl.load(gate_ptr + a * B + b, mask=inside, other=0.0)
    if GATED:
        x = gated(x, tl.load(up_ptr + a * B + b, mask=inside, other=0.0), FUSED)
    return tl.trans(x)


@triton.jit
def _by_group(x, GROUP: tl.constexpr):
    """Turn the result (columns, rows) of a product back into rows, or into groups."""
    x = tl.trans(x)
    if GROUP:
        x = tl.reshape(x, (x.shape[0] * x.shape[1] // GROUP, GROUP))
    return x


@triton.jit
def _ends(x, dtype: tl.constexpr, GROUP: tl.constexpr):
    """Return the least and the greatest number that x, rounded, has in each group."""
    if GROUP:
        low, high = tl.min(x, 1), tl.max(x, 1)
    else:
        low, high = tl.min(x), tl.max(x)
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@triton.jit
def _write(
    x, scale, zero, levels_ptr, START: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Quantize SIZE rows x from START on; return the sums of their levels by group, if SUMS."""
    if GROUP:
        scale, zero = scale[:, None], zero[:, None]
        a = tl.arange(0, SIZE * BLOCK // GROUP)[:, None]
        b = tl.arange(0, GROUP)[None, :]
        place = START * B + a * GROUP + b
        inside = (place < ROWS * B) & (b < GROUP)
    else:
        a = START + tl.arange(0, SIZE)[:, None]
        b = tl.arange(0, BLOCK)[None, :]
        place = a * B + b
        inside = (a < ROWS) & (b < B)
    levels = levels_of(x.to(tl.float32), scale, zero, LOW, HIGH, SHIFT, FUSED)
    tl.store(levels_ptr + place, levels.to(tl.int8), mask=inside)
    if SUMS:
        # read back, levels are summed as they lie; else they would be found twice, in two layouts
        tl.debug_barrier()
        levels = tl.load(levels_ptr + place, mask=inside, other=0).to(tl.int32)
        sums = tl.sum(levels, 1) if GROUP else tl.sum(levels)
    else:
        sums = tl.zeros((levels.shape[0],), tl.int32) if GROUP else 0
    return sums


@triton.jit
def _write_groups(
    scale, zero, sums, scale_ptr, zero_ptr, sums_ptr, START: tl.constexpr, GROUPS: tl.constexpr,
    SUMS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write what belongs to the groups from START on, or to the one group of a token."""
    zero = zero.to(tl.int32) - SHIFT
    if GROUPS == 1:
        tl.store(scale_ptr, scale)
        tl.store(zero_ptr, zero)
        if SUMS:
            tl.store(sums_ptr, sums)
    else:
        place = START + tl.arange(0, scale.shape[0])
        tl.store(scale_ptr + place, scale, mask=place < GROUPS)
        tl.store(zero_ptr + place, zero, mask=place < GROUPS)
        if SUMS:
            tl.store(sums_ptr + place, sums, mask=place < GROUPS)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    gate_ptr, up_ptr, left_ptr, right_ptr, levels_ptr, scale_ptr, zero_ptr, sums_ptr, tokens,
    gate_stride, up_stride, factor, clip, GATED: tl.constexpr, ROWS: tl.constexpr,
    LEFT: tl.constexpr, B: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT: tl.constexpr,
    FUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Quantize rotated tokens X (ROWS, B), of which FIRST rows and SECOND more are held apart.

    Products are (right X') left, so that the first result is an operand in registers; right, of
    order BLOCK, is a transposed factor already. LEFT: there is a left factor, of order FIRST +
    SECOND. Signs are loaded once: a program goes over many tokens.
    """
    dtype = gate_ptr.dtype.element_ty
    b, first = tl.arange(0, BLOCK), tl.arange(0, FIRST)
    right = tl.load(right_ptr + b[:, None] * BLOCK + b[None, :])
    if LEFT:
        size: tl.constexpr = FIRST + SECOND
        left11 = tl.load(left_ptr + first[:, None] * size + first[None, :])
    if SECOND:
        second = FIRST + tl.arange(0, SECOND)
        if LEFT:
            left12 = tl.load(left_ptr + first[:, None] * size + second[None, :])
            left21 = tl.load(left_ptr + second[:, None] * size + first[None, :])
            left22 = tl.load(left_ptr + second[:, None] * size + second[None, :])
    wait_for_inputs(PDL)
    for token in tl.range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        gates, ups = gate_ptr + token * gate_stride, up_ptr + token * up_stride
        x = _rows(gates, ups, 0, FIRST, ROWS, B, BLOCK, GATED, FUSED)
        x = (tl.dot(right, x) * factor).to(dtype)
        if SECOND:
            x2 = _rows(gates, ups, FIRST, SECOND, ROWS, B, BLOCK, GATED, FUSED)
            x2 = (tl.dot(right, x2) * factor).to(dtype)
        y = x
        if LEFT:
            y = tl.dot(x, left11)
            if SECOND:
                y = tl.dot(x2, left21, y)
        y = _by_group(y, GROUP)
        low, high = _ends(y, dtype, GROUP)
        y = y.to(dtype)
        if SECOND:
            y2 = x2
            if LEFT:
                y2 = tl.dot(x2, left22, tl.dot(x, left12))
            y2 = _by_group(y2, GROUP)
            low2, high2 = _ends(y2, dtype, GROUP)
            y2 = y2.to(dtype)
            if not GROUP:
                low, high = tl.minimum(low, low2), tl.maximum(high, high2)
        levels, groups = levels_ptr + token * (ROWS * B), token * GROUPS
        scale, zero = parameters_of(low, high, clip, HIGH, SYMMETRIC, False)
        sums = _write(
            y, scale, zero, levels, 0, ROWS, B, FIRST, BLOCK, GROUP, SUMS, LOW, HIGH, SHIFT, FUSED
        )
        if SECOND:
            scale2, zero2 = scale, zero
            if GROUP:
                scale2, zero2 = parameters_of(low2, high2, clip, HIGH, SYMMETRIC, False)
            sums2 = _write(
                y2, scale2, zero2, levels, FIRST, ROWS, B, SECOND, BLOCK, GROUP, SUMS, LOW, HIGH,
                SHIFT, FUSED,
            )  # fmt: skip
            if GROUP:
                _write_groups(
                    scale2, zero2, sums2, scale_ptr + groups, zero_ptr + groups, sums_ptr + groups,
                    FIRST * B // GROUP, GROUPS, SUMS, SHIFT,
                )  # fmt: skip
            else:
                sums += sums2
        _write_groups(
            scale, zero, sums, scale_ptr + groups, zero_ptr + groups, sums_ptr + groups, 0, GROUPS,
            SUMS, SHIFT,
        )  # fmt: skip
