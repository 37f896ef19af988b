"""The Triton kernels behind `launch`: norms, gates, quantizing."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.formats.integer_kernels import on_ties, parameters_of, part_of
from spinlab.runtime.kernels.overlap import wait_for_inputs

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it is rounded to even
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _fast_silu(gate):
    # 2 to the -gate·log2(e), and the inverse of what is 1 above it: both within 2 units
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e;"
        " add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e; }",
        "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def gated(gate, up, ASSEMBLY: tl.constexpr):
    """Return silu(gate)·up, each rounded to the dtype of the inputs."""
    wide = gate.to(tl.float32)
    silu = _fast_silu(wide) if ASSEMBLY else wide / (1.0 + tl.exp(-wide))
    # a product of two 16-bit numbers is exact in float32
    return (silu.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _quotient(x, scale, FUSED: tl.constexpr):
    """Return x / scale, rounded once; scale broadcasts against x."""
    if FUSED:
        inverse = tl.math.div_rn(scale * 0.0 + 1.0, scale)
        found = x * inverse
        # with an exact inverse and an exact remainder, one correction settles the last bit
        found = tl.fma(tl.fma(found, -scale, x), inverse, found)
    else:
        found = tl.math.div_rn(x, tl.zeros_like(x) + scale)
    return found


@triton.jit
def levels_of(
    x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, FUSED: tl.constexpr
):
    """Return the levels of x, less SHIFT, in int32; scale and zero broadcast against x."""
    placed = on_ties(_quotient(x, part_of(scale), FUSED)) + MAGIC
    placed = tl.minimum(tl.maximum(placed, MAGIC + (LOW - zero)), MAGIC + (HIGH - zero))
    # integers are the low bits of their sum with the magic number
    return placed.to(tl.int32, bitcast=True) + (zero.to(tl.int32) - (SHIFT + _MAGIC_BITS))


@triton.jit
def _write(
    x, token, inside, tokens, levels_ptr, scale_ptr, zero_ptr, sums_ptr, clip,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
    SUMS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Quantize x (STEP, MANY, BLOCK), float32 and zero outside, and write what belongs to it."""
    low, high = tl.min(x, axis=2), tl.max(x, axis=2)
    scale, zero = parameters_of(low, high, clip, HIGH, SYMMETRIC, False)
    levels = levels_of(x, scale[:, :, None], zero[:, :, None], LOW, HIGH, SHIFT, FUSED)
    group = tl.arange(0, MANY)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    place = token * (GROUPS * GROUP) + group * GROUP + column
    tl.store(levels_ptr + place, levels.to(tl.int8), mask=inside)
    place = tl.reshape(token * GROUPS + group, scale.shape)
    known = tl.reshape((token < tokens) & (group < GROUPS), scale.shape)
    tl.store(scale_ptr + place, scale, mask=known)
    tl.store(zero_ptr + place, zero.to(tl.int32) - SHIFT, mask=known)
    if SUMS:
        if BLOCK > GROUP:
            levels = tl.where(column < GROUP, levels, 0)
        tl.store(sums_ptr + place, tl.sum(levels, 2), mask=known)


@triton.jit(do_not_specialize=["tokens"])
def rows_kernel(
    x_ptr, other_ptr, levels_ptr, scale_ptr, zero_ptr, sums_ptr, tokens, stride, other_stride,
    epsilon, clip, GATED: tl.constexpr, NORMED: tl.constexpr, GAIN: tl.constexpr,
    STEP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr,
    BLOCK: tl.constexpr, SUMS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr, SHIFT: tl.constexpr, FUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Quantize STEP tokens of GROUPS groups of GROUP numbers.

    GATED: silu(x)·other. NORMED: x/rms(x), times other where there is GAIN. Else x itself.
    """
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)[:, None, None]
    group = tl.arange(0, MANY)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    place = group * GROUP + column
    known = (group < GROUPS) & (column < GROUP)
    inside = (token < tokens) & known
    x = tl.load(x_ptr + token * stride + place, mask=inside, other=0.0)
    if GATED:
        other = tl.load(other_ptr + token * other_stride + place, mask=inside, other=0.0)
        x = gated(x, other, FUSED)
    if NORMED:
        wide = x.to(tl.float32)
        mean = tl.sum(tl.sum(wide * wide, 2), 1) / (GROUPS * GROUP)
        inverse = tl.math.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + epsilon))
        x = (wide * inverse[:, None, None]).to(x.dtype)
        if GAIN:
            gain = tl.load(other_ptr + place, mask=known, other=0.0).to(x.dtype)
            x = (x.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
    _write(
        x.to(tl.float32), token, inside, tokens, levels_ptr, scale_ptr, zero_ptr, sums_ptr, clip,
        GROUPS, GROUP, MANY, BLOCK, SUMS, LOW, HIGH, SYMMETRIC, SHIFT, FUSED,
    )  # fmt: skip
