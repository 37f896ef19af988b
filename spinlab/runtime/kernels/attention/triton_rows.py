"""Packed rows as matrices: what tensor cores take of nibbles, and of queries beside them.

A pair of bytes of a packed row holds four levels; pair c has the numbers 2c (nibble 0), 2c + D/2
(1), 2c + 1 (2) and 2c + 1 + D/2 (3) of a head of D. Queries are split in the same way, and a
product with a row is the sum of four products with nibbles. Read as pairs, rows go through the
transposing loads of 16-bit matrices. A nibble n that is left where it is, in an otherwise empty
float16, is the number n·2^-24 or n·2^-20: tensor cores take such numbers exactly, so one mask
makes two operands.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

NOTHING = tl.constexpr(1e-30)  # below every sum of weights, and above that of none
# A nibble below 8 names one of the 8 bytes of two registers, and four nibbles four of them, in one
# permutation: levels are looked up as their low and their high bytes. Of 16 levels each half is
# looked up, and the nibble's highest bit, spread over a byte as its sign, chooses between them.
_UPPER = """
shl.b32 e, $4, 4;
prmt.b32 ma, e, $4, 0xD9C8; prmt.b32 mb, e, $4, 0xFBEA;
prmt.b32 x, $9, $11, a; lop3.b32 la, la, x, ma, 0xD8;
prmt.b32 x, $9, $11, b; lop3.b32 lb, lb, x, mb, 0xD8;
prmt.b32 x, $17, $19, a; lop3.b32 ha, ha, x, ma, 0xD8;
prmt.b32 x, $17, $19, b; lop3.b32 hb, hb, x, mb, 0xD8;
"""
_LOOKED_UP = """{{
.reg .b32 a, b, e, x, la, lb, ha, hb, ma, mb;
and.b32 a, $4, 0x77777777; shr.b32 b, a, 16;
prmt.b32 la, $5, $7, a; prmt.b32 ha, $13, $15, a;
prmt.b32 lb, $5, $7, b; prmt.b32 hb, $13, $15, b;
{upper}
prmt.b32 a, la, ha, 0x5140; prmt.b32 b, lb, hb, 0x5140;
prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;
prmt.b32 a, la, ha, 0x7362; prmt.b32 b, lb, hb, 0x7362;
prmt.b32 $2, a, b, 0x5410; prmt.b32 $3, a, b, 0x7632;
}}"""
OF_EIGHT = tl.constexpr(_LOOKED_UP.format(upper=""))
OF_SIXTEEN = tl.constexpr(_LOOKED_UP.format(upper=_UPPER))


@triton.jit
def _bytes(a, b, c, d, SHIFT: tl.constexpr):
    """Return one byte of each of four numbers of float16 in a register."""
    found = (a.to(tl.int16, bitcast=True) >> SHIFT).to(tl.int32) & 255
    found |= ((b.to(tl.int16, bitcast=True) >> SHIFT).to(tl.int32) & 255) << 8
    found |= ((c.to(tl.int16, bitcast=True) >> SHIFT).to(tl.int32) & 255) << 16
    return found | (((d.to(tl.int16, bitcast=True) >> SHIFT).to(tl.int32) & 255) << 24)


@triton.jit
def table(ptr, MANY: tl.constexpr, WIDE: tl.constexpr):
    """Load MANY levels as 16 scalars, the last one repeated, in float16 unless WIDE."""
    found = ()
    for index in tl.static_range(16):  # pyright: ignore[reportGeneralTypeIssues]
        level = tl.load(ptr + (index if index < MANY else 0)) if MANY > 0 else 0.0
        if MANY > 0 and not WIDE:
            level = level.to(tl.float16)  # pyright: ignore[reportAttributeAccessIssue]
        found += (level,)
    return found


@triton.jit
def words(levels):
    """Return 16 levels as the registers of `OF_SIXTEEN`: low bytes of four in each, then high."""
    return (
        _bytes(levels[0], levels[1], levels[2], levels[3], 0),
        _bytes(levels[4], levels[5], levels[6], levels[7], 0),
        _bytes(levels[8], levels[9], levels[10], levels[11], 0),
        _bytes(levels[12], levels[13], levels[14], levels[15], 0),
        _bytes(levels[0], levels[1], levels[2], levels[3], 8),
        _bytes(levels[4], levels[5], levels[6], levels[7], 8),
        _bytes(levels[8], levels[9], levels[10], levels[11], 8),
        _bytes(levels[12], levels[13], levels[14], levels[15], 8),
    )


@triton.jit
def _four(one, two, a, b, c, d):
    """Return the one of four that two bits choose."""
    return tl.where(two, tl.where(one, d, c), tl.where(one, b, a))


@triton.jit
def _named(n, levels, MANY: tl.constexpr):
    """Return the levels that numbers below MANY name: selects, for loads would be one by one."""
    one, two = (n & 1) != 0, (n & 2) != 0
    found = _four(one, two, levels[0], levels[1], levels[2], levels[3])
    if MANY > 4:
        upper = _four(one, two, levels[4], levels[5], levels[6], levels[7])
        found = tl.where((n & 4) != 0, upper, found)
    if MANY > 8:
        lower = _four(one, two, levels[8], levels[9], levels[10], levels[11])
        upper = _four(one, two, levels[12], levels[13], levels[14], levels[15])
        found = tl.where((n & 8) != 0, tl.where((n & 4) != 0, upper, lower), found)
    return found


@triton.jit
def nibbles(
    pairs, levels, INDEX: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return nibble INDEX of every pair: its level in float32, else times 2^-24 or 2^-20.

    LEVELS: how many it may name, and gives as they are; 0 on a grid. FAST: mask two pairs by one
    instruction, which the compiler does not find.
    """
    if LEVELS > 0:
        found = _named((pairs >> (4 * INDEX)) & 15, levels, LEVELS)
    elif WIDE:
        found = ((pairs >> (4 * INDEX)) & 15).to(tl.float32)
    elif FAST:
        if INDEX >= 2:
            pairs = tl.inline_asm_elementwise(
                "shr.b32 $0, $1, 8;", "=r,r", [pairs], dtype=tl.uint16, is_pure=True, pack=2
            )
        found = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x00F000F0;" if INDEX % 2 else "and.b32 $0, $1, 0x000F000F;",
            "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        pairs = pairs >> 8 if INDEX >= 2 else pairs
        found = (pairs & (0xF0 if INDEX % 2 else 0x0F)).to(tl.float16, bitcast=True)
    return found


@triton.jit
def all_nibbles(
    pairs, levels, LEVELS: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return all four nibbles of every pair, each as `nibbles` does."""
    if LEVELS > 0 and FAST and not WIDE:
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            OF_SIXTEEN if LEVELS > 8 else OF_EIGHT,  # pyright: ignore[reportArgumentType]
            "=r,=r,=r,=r" + 17 * ",r",
            [pairs, levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6],
             levels[7]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        n0 = nibbles(pairs, levels, 0, LEVELS, WIDE, FAST)
        n1 = nibbles(pairs, levels, 1, LEVELS, WIDE, FAST)
        n2 = nibbles(pairs, levels, 2, LEVELS, WIDE, FAST)
        n3 = nibbles(pairs, levels, 3, LEVELS, WIDE, FAST)
    return n0, n1, n2, n3


@triton.jit
def places(pair, index, D: tl.constexpr):
    """Return which numbers of a head the nibbles of an index hold."""
    return 2 * pair + index // 2 + (index % 2) * (D // 2)


@triton.jit
def order(number, D: tl.constexpr):
    """Return where a number of a head comes among those of nibble 0, then 1 and so on."""
    half, inner = number // (D // 2), number % (D // 2)
    return (2 * (inner % 2) + half) * (D // 4) + inner // 2


@triton.jit
def parameters(scale_ptr, zero_ptr, place, inside, MIDDLE: tl.constexpr):
    """Load scales and zero points; MIDDLE stands for the latter, or -1 where they are stored."""
    scale = tl.load(scale_ptr + place, mask=inside, other=1).to(tl.float32)
    if MIDDLE >= 0:
        zero = tl.full(place.shape, MIDDLE, tl.float32)
    else:
        zero = tl.load(zero_ptr + place, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def inverse_power(x):
    """Return the inverse of the largest power of two up to x, x > 0."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def queries(ptr, pair, taken, factor, D: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr):
    """Return queries of each nibble, their sum, and the factor of their products with nibbles.

    Both last: (HEADS,). Float16 holds queries relative to their largest power of two.
    """
    q0 = tl.load(ptr + places(pair, 0, D)[:, None], mask=taken, other=0).to(tl.float32)
    q1 = tl.load(ptr + places(pair, 1, D)[:, None], mask=taken, other=0).to(tl.float32)
    q2 = tl.load(ptr + places(pair, 2, D)[:, None], mask=taken, other=0).to(tl.float32)
    q3 = tl.load(ptr + places(pair, 3, D)[:, None], mask=taken, other=0).to(tl.float32)
    peak = tl.maximum(tl.maximum(tl.abs(q0), tl.abs(q1)), tl.maximum(tl.abs(q2), tl.abs(q3)))
    unit = inverse_power(tl.maximum(tl.max(peak, 0), NOTHING))
    if not WIDE:
        even = unit if LEVELS > 0 else unit * 16  # nibble 0 counts 16 times less than 1
        q0 = (q0 * even[None, :]).to(tl.float16)
        q1 = (q1 * unit[None, :]).to(tl.float16)
        q2 = (q2 * even[None, :]).to(tl.float16)
        q3 = (q3 * unit[None, :]).to(tl.float16)
    low = tl.sum(q0.to(tl.float32) + q2.to(tl.float32), 0)
    high = tl.sum(q1.to(tl.float32) + q3.to(tl.float32), 0)
    if WIDE:
        total, factors = low + high, unit * 0.0 + factor
    elif LEVELS > 0:
        total, factors = low + high, factor / unit
    else:
        total, factors = (low * 0.0625 + high) * 2.0**-20, factor * 2.0**20 / unit
    return (q0, q1, q2, q3), total, factors


@triton.jit
def product(
    k, q, levels, LEVELS: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Return the products of levels (BLOCK, PAIRS) with queries: (BLOCK, HEADS)."""
    n = all_nibbles(k, levels, LEVELS, WIDE, FAST)
    found = tl.dot(n[0], q[0], input_precision="tf32x3")
    found = tl.dot(n[1], q[1], found, input_precision="tf32x3")
    found = tl.dot(n[2], q[2], found, input_precision="tf32x3")
    return tl.dot(n[3], q[3], found, input_precision="tf32x3")


@triton.jit
def add(
    out, v, levels, weights, shrink, LEVELS: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Shrink what each nibble has summed up, and add levels (PAIRS, BLOCK) times weights."""
    n = all_nibbles(v, levels, LEVELS, WIDE, FAST)
    out0 = tl.dot(n[0], weights, out[0] * shrink, input_precision="tf32x3")
    out1 = tl.dot(n[1], weights, out[1] * shrink, input_precision="tf32x3")
    out2 = tl.dot(n[2], weights, out[2] * shrink, input_precision="tf32x3")
    out3 = tl.dot(n[3], weights, out[3] * shrink, input_precision="tf32x3")
    return out0, out1, out2, out3


@triton.jit
def levels_of_floats(out, zero, LEVELS: tl.constexpr, WIDE: tl.constexpr):
    """Return sums of levels less those of zero points, from sums of floats."""
    small = 1.0 if LEVELS > 0 or WIDE else 2.0**24
    large = 1.0 if LEVELS > 0 or WIDE else 2.0**20
    zero = zero[None, :]
    return (
        out[0] * small - zero,
        out[1] * large - zero,
        out[2] * small - zero,
        out[3] * large - zero,
    )
