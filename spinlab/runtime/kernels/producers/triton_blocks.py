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
    mean = tl.sum(wide * wide, 1) / WIDTH
    inverse = tl.math.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + epsilon))
    tl.store(inverse_ptr + token, inverse, mask=token < tokens)


@triton.jit
def _added(total, x, matrix, AS_FLOATS: tl.constexpr):
    """Return total + x matrix in float32, of two factors of 16 bits."""
    if AS_FLOATS:
        total = tl.dot(x.to(tl.float32), matrix.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(x, matrix, total)
    return total


@triton.jit
def _product(x, ptr, known, PARTS: tl.constexpr, APART: tl.constexpr, AS_FLOATS: tl.constexpr):
    """Return x M in float32: M is float32 itself, or a sum of two 16-bit matrices.

    So is an x of float32 a sum of two, and the product three products; the fourth counts nothing.
    """
    high = tl.load(ptr, mask=known, other=0.0)
    if PARTS == 2:
        low = tl.load(ptr + APART, mask=known, other=0.0)
        top = x.to(high.dtype)
        found = tl.zeros((x.shape[0], high.shape[1]), tl.float32)
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
    many, GATED: tl.constexpr, NORMED: tl.constexpr, GAIN: tl.constexpr, DEALT: tl.constexpr,
    ACROSS: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, BLOCKS: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, AS_FLOATS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rotate `many` blocks of B numbers of STEP tokens; parts are (PARTS, BLOCKS or 1, B, B).

    GATED: of silu(x)·other. NORMED: of x·inverse, times other where there is GAIN. ACROSS: what is
    written is (width, tokens), so that what deals channels reads each of them in one piece. DEALT:
    place j takes number order[j] of such an x.
    """
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)[:, None]
    b = tl.arange(0, BLOCK)
    inside = (token < tokens) & (b < B)[None, :]
    square, known = b[:, None] * B + b[None, :], (b < B)[:, None] & (b < B)[None, :]
    # one stage: loads ahead would take more shared memory than there is
    for index in tl.range(0, many, num_stages=1):
        block = tl.program_id(1) * many + index
        place = block * B + b[None, :]
        if DEALT:
            source = tl.load(order_ptr + place, mask=(b < B)[None, :], other=0).to(tl.int64)
            x = tl.load(x_ptr + source * tokens + token, mask=inside, other=0.0)
        else:
            x = tl.load(x_ptr + token * stride + place, mask=inside, other=0.0)
        if GATED:
            other = tl.load(other_ptr + token * other_stride + place, mask=inside, other=0.0)
            x = gated(x, other, False)
        if NORMED:
            inverse = tl.load(inverse_ptr + token, mask=token < tokens, other=0.0)
            x = (x.to(tl.float32) * inverse).to(x.dtype)
            if GAIN:
                gain = tl.load(other_ptr + place, mask=(b < B)[None, :], other=0.0).to(x.dtype)
                x = (x.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
        matrix = parts_ptr + (0 if SHARED else block * B * B) + square
        y = _product(x, matrix, known, PARTS, (1 if SHARED else BLOCKS) * B * B, AS_FLOATS)
        at = place.to(tl.int64) * tokens + token if ACROSS else token * (BLOCKS * B) + place
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
