"""The Triton kernels behind `launch`.

Weights are the first operand of every product: a tensor core takes that one from registers, so
nibbles are unpacked there and never written back to shared memory. A nibble in the upper half of a
byte is 16 times its level, which costs one operation for four of them; accumulators are divided by
16 at the end, exactly.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.tiles import tile_of

_BYTES = tl.constexpr(
    "{ shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }"
)
# A nibble with its sign bit flipped is level + 8. Put below an exponent byte it is the end of the
# fraction of 128 (bfloat16) or 1024 (float16); the sum of both offsets is taken off again.
_FLOATS = """{{
.reg .b32 low, high, one, offset;
mov.b32 one, {one}; mov.b32 offset, {offset};
and.b32 low, $4, 0x0F0F0F0F; xor.b32 low, low, 0x08080808;
shr.b32 high, $4, 4; and.b32 high, high, 0x0F0F0F0F; xor.b32 high, high, 0x08080808;
prmt.b32 $0, low, {exponent}, 0x4140; prmt.b32 $1, low, {exponent}, 0x4342;
prmt.b32 $2, high, {exponent}, 0x4140; prmt.b32 $3, high, {exponent}, 0x4342;
fma.rn.{kind} $0, $0, one, offset; fma.rn.{kind} $1, $1, one, offset;
fma.rn.{kind} $2, $2, one, offset; fma.rn.{kind} $3, $3, one, offset;
}}"""
_BFLOATS = tl.constexpr(
    _FLOATS.format(kind="bf16x2", exponent="0x43", one="0x3F803F80", offset="0xC308C308")
)
_HALVES = tl.constexpr(
    _FLOATS.format(kind="f16x2", exponent="0x64", one="0x3C003C00", offset="0xE408E408")
)


@triton.jit
def times_16(packed, ASM: tl.constexpr):
    """Return the low and the high nibbles of bytes as 16 times their level, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            _BYTES,  # pyright: ignore[reportArgumentType]
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return (packed << 4).to(tl.int8, bitcast=True), (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def as_floats(packed, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return the low and the high nibbles of bytes as levels in a float dtype."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BFLOATS,  # pyright: ignore[reportArgumentType]
            "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=4,
        )  # fmt: skip
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _HALVES,  # pyright: ignore[reportArgumentType]
            "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
    signed = packed.to(tl.int8, bitcast=True)
    return ((signed << 4) >> 4).to(dtype), (signed >> 4).to(dtype)


@triton.jit
def add_zeros(
    acc, m, n, tokens, out, block, z_ptr, a_ptr, u_ptr, c_ptr, FACTOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, INPUT_GROUPS: tl.constexpr,
    WEIGHT_GROUPS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Add, FACTOR times, what zero points add to a block's products of levels (out, tokens)."""
    group, of_weight = block // (BLOCKS // INPUT_GROUPS), block // (BLOCKS // WEIGHT_GROUPS)
    z = tl.load(z_ptr + m * INPUT_GROUPS + group, mask=m < tokens, other=0)
    c = tl.load(c_ptr + n * BLOCKS + block, mask=n < out, other=0)
    acc += c[:, None] * (-FACTOR * z)[None, :]
    if ZEROS:
        a = tl.load(a_ptr + m * BLOCKS + block, mask=m < tokens, other=0)
        u = tl.load(u_ptr + n * WEIGHT_GROUPS + of_weight, mask=n < out, other=0)
        acc += u[:, None] * (FACTOR * (WIDTH * z - a))[None, :]
    return acc


@triton.jit
def of_tokens(ptr, m, tokens, group, GROUPS: tl.constexpr):
    """Return the scales of tokens as a row."""
    return tl.load(ptr + m * GROUPS + group, mask=m < tokens, other=0.0)[None, :]


@triton.jit
def of_outputs(ptr, n, out, group, GROUPS: tl.constexpr):
    """Return the scales of outputs as a column."""
    return tl.load(ptr + n * GROUPS + group, mask=n < out, other=0.0)[:, None]


@triton.jit
def add_block(
    total, acc, m, n, tokens, out, block, s_ptr, t_ptr, BLOCKS: tl.constexpr,
    INPUT_GROUPS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr,
):  # fmt: skip
    """Add one of several blocks, given 16 times its integers, to a sum that lacks a scale t."""
    s = of_tokens(s_ptr, m, tokens, block // (BLOCKS // INPUT_GROUPS), INPUT_GROUPS) * 0.0625
    found = acc.to(tl.float32)
    if WEIGHT_GROUPS > 1:  # else it comes at the end
        found *= of_outputs(t_ptr, n, out, block // (BLOCKS // WEIGHT_GROUPS), WEIGHT_GROUPS)
    return tl.fma(found, tl.broadcast_to(s, found.shape), total)


@triton.jit
def with_bias(total, bias_ptr, n, out, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def with_added(y, added_ptr, row, column, tokens, out, ADDED: tl.constexpr):
    """Return a tile of results (tokens, out) added to the one there, which begins at a place."""
    if ADDED:
        m, n = tl.arange(0, y.shape[0])[:, None], tl.arange(0, y.shape[1])[None, :]
        inside = (row + m < tokens) & (column + n < out)
        added_ptr += row * out.to(tl.int64) + column
        added = tl.load(added_ptr + m * out + n, mask=inside, other=0.0).to(tl.float32)
        y = (added + y.to(tl.float32)).to(y.dtype)
    return y


@triton.jit
def _products(acc, x_tiles, w_tiles, row, column, block, at, HALF: tl.constexpr, ASM: tl.constexpr):
    """Add the products of one tile of packed weights."""
    packed = w_tiles.load([column, block * HALF + at])
    first = x_tiles.load([row, 2 * block * HALF + at])
    second = x_tiles.load([row, (2 * block + 1) * HALF + at])
    low, high = times_16(packed, ASM)  # pyright: ignore[reportGeneralTypeIssues]
    acc = tl.dot(low, first.T, acc, out_dtype=tl.int32)
    return tl.dot(high, second.T, acc, out_dtype=tl.int32)


@triton.jit(do_not_specialize=["tokens"])
def prefill_kernel(
    x_tiles, w_tiles, y_tiles, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr, bias_ptr,
    added_ptr, tokens, out, HALF: tl.constexpr, BLOCKS: tl.constexpr, INPUT_GROUPS: tl.constexpr,
    WEIGHT_GROUPS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute tiles (BM tokens, BN outputs); a program stays and takes every PROGRAMS-th one.

    x_tiles, w_tiles, y_tiles: descriptors of levels (tokens, in), packed weights (out, in/2) and
    the result (tokens, out). Blocks have 2·HALF columns. Of several blocks, BK divides HALF; of a
    single one it need not, because tiles of weights are zero behind the edge.
    """
    wait_for_inputs(PDL)
    rows, columns = tl.cdiv(tokens, BM), tl.cdiv(out, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=BLOCKS == 1):
        row, column = tile_of(tile, rows, columns, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
        m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        acc = tl.zeros((BN, BM), tl.int32)
        if BLOCKS == 1:
            for at in tl.range(0, HALF, BK, num_stages=STAGES):
                acc = _products(acc, x_tiles, w_tiles, row * BM, column * BN, 0, at, HALF, ASM)
            acc = add_zeros(
                acc >> 4, m, n, tokens, out, 0, z_ptr, a_ptr, u_ptr, c_ptr, 1, 2 * HALF, 1, 1, 1,
                ZEROS,
            )  # fmt: skip
            total = acc.to(tl.float32) * of_tokens(s_ptr, m, tokens, 0, 1)
        else:
            total = tl.zeros((BN, BM), tl.float32)
            for block in tl.range(0, BLOCKS, num_stages=STAGES):
                acc = add_zeros(
                    tl.zeros((BN, BM), tl.int32), m, n, tokens, out, block, z_ptr, a_ptr, u_ptr,
                    c_ptr, 16, 2 * HALF, BLOCKS, INPUT_GROUPS, WEIGHT_GROUPS, ZEROS,
                )  # fmt: skip
                for at in tl.static_range(0, HALF, BK):
                    acc = _products(
                        acc, x_tiles, w_tiles, row * BM, column * BN, block, at, HALF, ASM
                    )
                total = add_block(
                    total, acc, m, n, tokens, out, block, s_ptr, t_ptr, BLOCKS, INPUT_GROUPS,
                    WEIGHT_GROUPS,
                )  # fmt: skip
        if WEIGHT_GROUPS == 1:
            total *= of_outputs(t_ptr, n, out, 0, 1)
        total = with_bias(total, bias_ptr, n, out, BIAS)
        y = tl.trans(total.to(y_tiles.dtype))
        y = with_added(y, added_ptr, row * BM, column * BN, tokens, out, ADDED)
        y_tiles.store([row * BM, column * BN], y)
