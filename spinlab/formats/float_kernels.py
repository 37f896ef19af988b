"""The Triton kernels behind `spinlab.formats.float_triton`.

What they know of a format, and how numbers are dealt to programs, are its `Kind` and `Tile`. A
program has `step` tokens and walks through their groups, `many` at a time: the rows (n, block) that
it holds at once are groups, token after token. Numbers of groups are (n, 1).
"""
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false

import triton
import triton.language as tl

from spinlab.formats.float_scales import (
    bits_of,
    float_of,
    floored,
    group_scale,
    most_of,
    power,
    token_scale,
)
from spinlab.formats.integer import PARTS
from spinlab.formats.integer_kernels import even, on_ties

_PARTS = tl.constexpr(PARTS)  # of a level


@triton.jit
def quotient(x, scale, KIND: tl.constexpr):
    """Return |x| in units of scale."""
    if KIND.powers:  # whose inverses are exact
        return tl.abs(x * float_of(0x7F000000 - bits_of(scale)))
    else:
        return tl.abs(tl.math.div_rn(x, tl.broadcast_to(scale, x.shape)))


@triton.jit
def step_of(size, KIND: tl.constexpr):
    """Return the exponent e of 2^e, by which floats lie apart around a size; at most the last."""
    exponent = tl.maximum((bits_of(size) >> 23) - 127, KIND.smallest)
    return tl.minimum(exponent, KIND.last) - KIND.mantissa


@triton.jit
def nearest_of(size, KIND: tl.constexpr):
    """Return sizes as `nearest` rounds them; what lies outside is not clipped."""
    step = step_of(size, KIND)
    return even(size * power(-step)) * power(step)


@triton.jit
def _settled(size, KIND: tl.constexpr):
    """Return sizes as `settled` rounds them; what lies outside is not clipped."""
    step = step_of(size, KIND)
    return even(on_ties(size * (_PARTS * power(-step)))) * power(step)


@triton.jit
def clipped(size, KIND: tl.constexpr):
    return tl.where(size < KIND.top, size, KIND.top)


@triton.jit
def _squares(x, size, scale, KIND: tl.constexpr, TILE: tl.constexpr):
    """Return the squared error of each row, (n, 1): neighbours are added, then their sums."""
    halvings: tl.constexpr = TILE.halvings
    error = clipped(nearest_of(size, KIND), KIND) * scale - tl.abs(x)
    error = error * error
    for _ in tl.static_range(halvings):
        error = tl.sum(tl.reshape(error, (error.shape[0], error.shape[1] // 2, 2)), 2)
    return error


@triton.jit
def coded(x, shared, ratio, KIND: tl.constexpr, TILE: tl.constexpr):
    """Return the scales of groups x (n, block), and |x|, rounded, in units of them, not clipped."""
    if KIND.first is None:
        scale = shared
    else:
        peak = float_of(most_of(x)) * ratio
        scale = group_scale(peak, shared, KIND.first, KIND)
    size = quotient(x, scale, KIND)
    if KIND.other is not None:
        wide = group_scale(peak, shared, KIND.other, KIND)
        other = quotient(x, wide, KIND)
        better = _squares(x, other, wide, KIND, TILE) < _squares(x, size, scale, KIND, TILE)
        scale, size = tl.where(better, wide, scale), tl.where(better, other, size)
    return scale, _settled(size, KIND)


@triton.jit
def signed(size, x):
    """Return numbers >= 0 with the signs of x, of zeros too."""
    return float_of(bits_of(size) | (bits_of(x) & -0x80000000))


@triton.jit
def places_of(begin, tokens, TILE: tl.constexpr):
    """Return a program's groups from `begin` of its tokens on, where their numbers lie, and which.

    The first result is (n, 1), the second (n, block); the third says which of these are there.
    """
    row = tl.arange(0, TILE.step * TILE.many)[:, None]
    token = tl.program_id(0).to(tl.int64) * TILE.step + row // TILE.many
    group = begin + row % TILE.many
    place = tl.arange(0, TILE.block)[None, :]
    column = group * TILE.group + place
    inside = (token < tokens) & (group < TILE.count)
    if TILE.group < TILE.block:
        inside = inside & (place < TILE.group)
    if TILE.count * TILE.group > TILE.width:  # pieces of a token, of which the last is shorter
        inside = inside & (column < TILE.width)
    return token * TILE.count + group, token * TILE.width + column, inside


@triton.jit
def shared_of(x_ptr, tokens, ratio, peak, KIND: tl.constexpr, TILE: tl.constexpr):
    """Return what the groups of each token share, for every row (n, 1); 0 where that is nothing."""
    rows: tl.constexpr = TILE.step * TILE.many
    if not KIND.shares:
        shared = tl.zeros((rows, 1), tl.float32)
    elif KIND.given:
        shared = token_scale(tl.full((rows, 1), peak, tl.float32), KIND)
    else:
        most = tl.zeros((rows, 1), tl.int32)
        for begin in range(0, TILE.count, TILE.many):
            _, place, inside = places_of(begin, tokens, TILE)
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            most = tl.maximum(most, most_of(x))
        most = tl.max(tl.reshape(most, (TILE.step, TILE.many)), 1, keep_dims=True)
        found = token_scale(float_of(most) * ratio, KIND)
        shared = tl.reshape(tl.broadcast_to(found, (TILE.step, TILE.many)), (rows, 1))
    return shared


@triton.jit
def round_kernel(
    x_ptr, out_ptr, tokens, clip, peak, KIND: tl.constexpr, TILE: tl.constexpr,
    KNOWN: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """Round tokens; the arguments are those of `round_rows`.

    clip is a number where it is KNOWN, else a pointer to one.
    """
    ratio = clip if KNOWN else tl.load(clip)
    shared = shared_of(x_ptr, tokens, ratio, peak, KIND, TILE)
    for begin in range(0, TILE.count, TILE.many):
        _, place, inside = places_of(begin, tokens, TILE)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale, size = coded(x, shared, ratio, KIND, TILE)
        found = signed(clipped(size, KIND), x) * scale
        if ERROR:
            found = found - x
        tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def encode_kernel(
    x_ptr, levels_ptr, scale_ptr, zero_ptr, tokens, clip, peak, KIND: tl.constexpr,
    TILE: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Code tokens; the arguments are those of `encode_rows`.

    clip is a number where it is KNOWN, else a pointer to one.
    """
    ratio = clip if KNOWN else tl.load(clip)
    shared = shared_of(x_ptr, tokens, ratio, peak, KIND, TILE)
    for begin in range(0, TILE.count, TILE.many):
        group, place, inside = places_of(begin, tokens, TILE)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scale, size = coded(x, shared, ratio, KIND, TILE)
        levels = signed(clipped(size, KIND), x) + KIND.top
        tl.store(levels_ptr + place, levels.to(tl.uint8), mask=inside)
        here = tl.max(inside.to(tl.int32), 1, keep_dims=True) > 0
        tl.store(scale_ptr + group, scale, mask=here)
        zero = tl.full(scale.shape, KIND.top, tl.float32).to(tl.int32)
        tl.store(zero_ptr + group, zero, mask=here)


@triton.jit
def pull_back_kernel(
    x_ptr, gradient_ptr, ratio_ptr, out_ptr, sums_ptr, tokens, KIND: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Pull the gradient of groups back, each a token; the arguments are those of `pull_back_rows`.

    Each program writes one part of the sum that is the log ratio's gradient.
    """
    ratio = tl.load(ratio_ptr)
    _, place, inside = places_of(0, tokens, TILE)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    peak = float_of(most_of(x)) * ratio
    scale, size = coded(x, token_scale(peak, KIND), ratio, KIND, TILE)
    exact = tl.math.div_rn(x, scale)
    within = tl.abs(exact) <= KIND.top
    kept = signed(clipped(size, KIND), x)
    of_scale = gradient * tl.where(within, kept - exact, kept)
    of_peak = tl.sum(of_scale, 1, keep_dims=True) * tl.math.div_rn(scale, floored(peak)) * ratio
    lowest, highest = tl.min(x, 1, keep_dims=True), tl.max(x, 1, keep_dims=True)
    up = highest >= -lowest
    at = x == tl.where(up, highest, lowest)  # of zeros alone what is not there, too: no share
    of_extreme = tl.where(up, of_peak, -of_peak)
    share = tl.math.div_rn(of_extreme, tl.maximum(tl.sum(at.to(tl.float32), 1, keep_dims=True), 1))
    found = tl.where(within, gradient, 0.0) + tl.where(at, share, 0.0)
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=inside)
    of_log = tl.sum(of_peak * tl.maximum(highest, -lowest), 0)
    tl.store(sums_ptr + tl.program_id(0) + tl.arange(0, 1), of_log)
