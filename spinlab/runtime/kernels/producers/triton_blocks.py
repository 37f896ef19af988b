"""The Triton kernels that rotate inputs in blocks, by a matrix for each or one for all."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.producers.triton import gated


@triton.jit(do_not_specialize=["tokens"])
def inverse_kernel(
    x_ptr, inverse_ptr, tokens, stride, epsilon, WIDTH: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write 1 / rms(x) of STEP tokens of WIDTH numbers, in float32."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens)[:, None] & (column < WIDTH)
    wide = tl.load(x_ptr + token[:, None] * stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = _inverse(tl.sum(wide * wide, 1) / WIDTH, epsilon)
    tl.store(inverse_ptr + token, inverse, mask=token < tokens)


@triton.jit
def _inverse(mean, epsilon):
    return tl.math.div_rn(tl.zeros_like(mean) + 1.0, tl.sqrt_rn(mean + epsilon))


@triton.jit
def _added(total, x, matrix, AS_FLOATS: tl.constexpr):
    """Return total + x matrix in float32, of two factors of 16 bits."""
    if AS_FLOATS:
        total = tl.dot(x.to(tl.float32), matrix.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(x, matrix, total)
    return total


@triton.jit
def _product(x, high, low, PARTS: tl.constexpr, AS_FLOATS: tl.constexpr):
    """Return x M in float32: M is float32 itself, or one 16-bit matrix or a sum of two.

    So is an x of float32 a sum of two, and the product three products; the fourth counts nothing.
    """
    if high.dtype != tl.float32:
        top = x.to(high.dtype)
        found = tl.zeros((x.shape[0], high.shape[1]), tl.float32)
        if PARTS == 2:
            found = _added(found, top, low, AS_FLOATS)
        if x.dtype == tl.float32:
            found = _added(found, (x - top.to(tl.float32)).to(high.dtype), high, AS_FLOATS)
        found = _added(found, top, high, AS_FLOATS)
    else:
        found = tl.dot(x.to(tl.float32), high, input_precision="tf32x3")
    return found


@triton.jit(do_not_specialize=["tokens", "many"])
def blocks_kernel(
    x_ptr, other_ptr, inverse_ptr, order_ptr, parts_ptr, out_ptr, tokens, stride, other_stride,
    out_stride, many, epsilon, GATED: tl.constexpr, NORMED: tl.constexpr, ALONE: tl.constexpr,
    GAIN: tl.constexpr, DEALT: tl.constexpr, ACROSS: tl.constexpr, PARTS: tl.constexpr,
    SHARED: tl.constexpr, BLOCKS: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    AS_FLOATS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write PIECE numbers of a rotated block of B, of many·STEP tokens; one program each.

    parts are (PARTS, BLOCKS or 1, B, B). GATED: of silu(x)·other. NORMED: of x·inverse, times other
    where there is GAIN; that of a token that is ALONE is taken here. ACROSS: what is written is
    (width, out_stride), so that what deals channels reads each of them in one piece. There tokens
    are filled up to whole tiles, and moved 16 bytes at a time. DEALT: place j takes number order[j]
    of such an x.
    """
    tl.static_assert(not (DEALT and (GATED or NORMED)), "gates and norms come before a deal")
    first, second = tl.program_id(0).to(tl.int64) * many, tl.program_id(1)
    pieces: tl.constexpr = (B + PIECE - 1) // PIECE
    block, b = second // pieces, tl.arange(0, BLOCK)
    piece = second % pieces * PIECE + tl.arange(0, PIECE)
    place, found = block * B + b, block * B + piece
    # what no kernel before has written, read before one waits for it
    matrix = parts_ptr + (0 if SHARED else block * B * B) + b[:, None] * B + piece[None, :]
    known = (b < B)[:, None] & (piece < B)[None, :]
    high = tl.load(matrix, mask=known, other=0.0)
    low = high
    if PARTS == 2:
        low = tl.load(matrix + (1 if SHARED else BLOCKS) * B * B, mask=known, other=0.0)
    source = place
    if DEALT:
        source = tl.load(order_ptr + place, mask=b < B, other=0)
    if GAIN:
        gain = tl.load(other_ptr + place, mask=b < B, other=0.0)[None, :]
    wait_for_inputs(PDL)
    if ALONE:
        column = tl.arange(0, WHOLE)
        row = tl.load(x_ptr + column, mask=column < BLOCKS * B, other=0.0).to(tl.float32)
        of_token = _inverse(tl.sum(row * row) / (BLOCKS * B), epsilon)
    for index in tl.range(0, many, num_stages=STAGES):
        begin = (first + index) * STEP
        token = begin + tl.arange(0, STEP)[:, None]
        if DEALT:
            inside = (begin < stride) & (b < B)[None, :]
            x = tl.load(
                x_ptr + source[None, :].to(tl.int64) * stride + token, mask=inside, other=0.0
            )
        else:
            inside = (token < tokens) & (b < B)[None, :]
            x = tl.load(x_ptr + token * stride + place[None, :], mask=inside, other=0.0)
        if GATED:
            other = tl.load(
                other_ptr + token * other_stride + place[None, :], mask=inside, other=0.0
            )
            x = gated(x, other, not AS_FLOATS)
        if NORMED:
            if ALONE:
                inverse = of_token
            else:
                inverse = tl.load(inverse_ptr + token, mask=token < tokens, other=0.0)
            x = (x.to(tl.float32) * inverse).to(x.dtype)
            if GAIN:
                x = (x.to(tl.float32) * gain.to(x.dtype).to(tl.float32)).to(x.dtype)
        y = _product(x, high, low, PARTS, AS_FLOATS).to(out_ptr.dtype.element_ty)
        if ACROSS:
            inside = (begin < out_stride) & (piece < B)[None, :]
            tl.store(out_ptr + found[None, :].to(tl.int64) * out_stride + token, y, mask=inside)
        else:
            inside = (token < tokens) & (piece < B)[None, :]
            tl.store(out_ptr + token * out_stride + found[None, :], y, mask=inside)
