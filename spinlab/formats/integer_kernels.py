"""The Triton kernels behind `spinlab.formats.integer_triton`."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.formats.integer import HALF_PART, PARTS, SMALLEST_HALF, smallest_scale

_PART = tl.constexpr(1 / PARTS)  # of a level
_HALF_PART = tl.constexpr(HALF_PART)
_SMALLEST = tl.constexpr(smallest_scale(torch.float32))
_SMALLEST_HALF = tl.constexpr(SMALLEST_HALF)


@triton.jit
def even(x):
    """Round to even: adding 1.5 * 2**23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def part_of(scale):
    return scale * _PART


@triton.jit
def on_ties(parts):
    """Return what, rounded half to even, is `spinlab.formats.integer.settled`, in levels."""
    return even(parts) * _PART


@triton.jit
def parameters_of(low, high, clip, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr):
    """Return scale and zero point of a range that is shrunk by clip and contains 0.

    HALF: the scale is one that float16 stores.
    """
    low, high = tl.minimum(low, 0.0) * clip, tl.maximum(high, 0.0) * clip
    span = tl.maximum(high, -low) if SYMMETRIC else high - low
    scale = tl.maximum(tl.math.div_rn(span, HIGH * 1.0), _SMALLEST)
    if HALF:
        scale = tl.maximum(scale, _SMALLEST_HALF).to(tl.float16).to(tl.float32)
    if SYMMETRIC:
        return scale, tl.zeros_like(scale)
    zero = even(on_ties(tl.math.div_rn(-low, part_of(scale))))
    if HALF:
        zero = tl.minimum(tl.maximum(zero, 0.0), HIGH * 1.0)
    return scale, zero


@triton.jit
def places_of(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return a program's rows (STEP, 1), where their numbers lie, and which are there."""
    row = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, row * WIDTH + column, (row < rows) & (column < WIDTH)


@triton.jit
def levels_of(
    x, clip, STEP: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Return the levels of rows x (STEP, BLOCK), with scale and zero (STEP,)."""
    lowest, highest = tl.min(x, 1), tl.max(x, 1)
    scale, zero = parameters_of(lowest, highest, clip, HIGH, SYMMETRIC, HALF)
    parts = tl.math.div_rn(x, tl.broadcast_to(part_of(scale)[:, None], (STEP, BLOCK)))
    levels = even(on_ties(parts)) + zero[:, None]
    levels = tl.minimum(tl.maximum(levels, LOW * 1.0), HIGH * 1.0)
    return levels, scale, zero


@triton.jit
def round_kernel(
    x_ptr, out_ptr, rows, clip, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, KNOWN: tl.constexpr,
    HALF: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """Round STEP rows of WIDTH numbers; the arguments are those of `round_rows`.

    clip is a number where it is KNOWN, else a pointer to one.
    """
    ratio = clip if KNOWN else tl.load(clip)
    _, place, inside = places_of(  # pyright: ignore[reportGeneralTypeIssues]
        rows, WIDTH, BLOCK, STEP
    )
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    levels, scale, zero = levels_of(  # pyright: ignore[reportGeneralTypeIssues]
        x, ratio, STEP, BLOCK, LOW, HIGH, SYMMETRIC, HALF
    )
    found = (levels - zero[:, None]) * scale[:, None]
    if ERROR:
        found = found - x
    found = tl.where(tl.abs(x) < float("inf"), found, x)  # NaN stays NaN
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def encode_kernel(
    x_ptr, levels_ptr, scale_ptr, zero_ptr, rows, clip, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr,
    KNOWN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Code STEP rows of WIDTH numbers; the arguments are those of `encode_rows`.

    clip is a number where it is KNOWN, else a pointer to one.
    """
    ratio = clip if KNOWN else tl.load(clip)
    row, place, inside = places_of(  # pyright: ignore[reportGeneralTypeIssues]
        rows, WIDTH, BLOCK, STEP
    )
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    levels, scale, zero = levels_of(  # pyright: ignore[reportGeneralTypeIssues]
        x, ratio, STEP, BLOCK, LOW, HIGH, SYMMETRIC, HALF
    )
    # what is no number has no level: the scale says it of the whole row
    broken = tl.max(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0), 1) > 0
    tl.store(levels_ptr + place, (levels - LOW).to(tl.uint8), mask=inside)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(scale_ptr + row, scale[:, None], mask=row < rows)
    tl.store(zero_ptr + row, (zero - LOW)[:, None].to(tl.int32), mask=row < rows)


@triton.jit
def pull_back_kernel(
    x_ptr, gradient_ptr, ratio_ptr, out_ptr, sums_ptr, rows, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Pull the gradient of STEP rows back; the arguments are those of `pull_back_rows`.

    Each program writes one part of the sum that is the log ratio's gradient.
    """
    ratio = tl.load(ratio_ptr)
    _, place, inside = places_of(  # pyright: ignore[reportGeneralTypeIssues]
        rows, WIDTH, BLOCK, STEP
    )
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    lowest, highest = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    scale, zero = parameters_of(lowest, highest, ratio, HIGH, SYMMETRIC, HALF)
    parts = tl.math.div_rn(x, tl.broadcast_to(part_of(scale)[:, None], (STEP, BLOCK)))
    levels = tl.minimum(tl.maximum(even(on_ties(parts)) + zero[:, None], LOW * 1.0), HIGH * 1.0)
    error = levels - zero[:, None] - parts * _PART
    bottom = scale * LOW if SYMMETRIC else lowest * ratio
    top = bottom + scale * (HIGH - LOW)
    free = scale > (_SMALLEST_HALF if HALF else _SMALLEST)
    slack = scale * tl.where(free, _HALF_PART, (HIGH - LOW) * 1.0)
    over, under = x > (top + slack)[:, None], x < (bottom - slack)[:, None]
    above = tl.sum(tl.where(over, gradient, 0.0), 1)
    below = tl.sum(tl.where(under, gradient, 0.0), 1)
    passed = tl.where(over | under, 0.0, gradient)
    of_scale = tl.where(free, tl.sum(passed * error, 1), 0.0)
    if SYMMETRIC:
        of_peak = (of_scale + HIGH * above + LOW * below) * ratio / HIGH
        of_highest = tl.where(highest >= -lowest, of_peak, 0.0)
        of_lowest = tl.where(highest >= -lowest, 0.0, -of_peak)
    else:
        of_scale -= (above + below) * (tl.math.div_rn(bottom, scale) + zero)
        of_highest = tl.where(highest > 0, (above + of_scale / HIGH) * ratio, 0.0)
        of_lowest = tl.where(lowest < 0, (below - of_scale / HIGH) * ratio, 0.0)
    at_highest, at_lowest = x == highest[:, None], x == lowest[:, None]
    many = tl.maximum(tl.sum(at_highest.to(tl.float32), 1), 1.0)
    found = passed + tl.where(at_highest, (of_highest / many)[:, None], 0.0)
    many = tl.maximum(tl.sum(at_lowest.to(tl.float32), 1), 1.0)
    found += tl.where(at_lowest, (of_lowest / many)[:, None], 0.0)
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(of_highest * highest + of_lowest * lowest, 0))
