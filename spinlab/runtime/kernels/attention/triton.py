"""The Triton kernels behind `launch`.

Rows go through `triton_rows` to tensor cores: a product with a row is the sum of four products with
its nibbles.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.formats.integer import SMALLEST_HALF
from spinlab.runtime.kernels.attention.triton_rows import (
    NOTHING,
    add,
    levels_of_floats,
    parameters,
    places,
    product,
    queries,
    table,
    words,
)
from spinlab.runtime.kernels.overlap import wait_for_inputs

_ROOM = tl.constexpr(12.0)  # powers of two between the largest weight and 1: float16 goes to 2^15
LEAST = tl.constexpr(-1e30)  # below every score, and finite
_SMALLEST_SCALE = tl.constexpr(SMALLEST_HALF)  # that a codec stores


@triton.jit
def vectors_of(ptr, row, taken, factor, ROTARY: tl.constexpr, WAVES: tl.constexpr):
    """Return what biases of keys multiply cosines and sines with: (WAVES, HEADS) each, float32."""
    wave = tl.arange(0, WAVES)[:, None]
    inside = (wave < ROTARY // 2) & taken[None, :]
    ptr += row[None, :] * ROTARY + wave
    of_cos = tl.load(ptr, mask=inside, other=0) * factor
    of_sin = tl.load(ptr + ROTARY // 2, mask=inside, other=0) * factor
    return of_cos, of_sin


@triton.jit
def of_bias(waves_ptr, slot, there, vectors, ROTARY: tl.constexpr, WAVES: tl.constexpr):
    """Return what biases add to scores of slots: (BLOCK, HEADS)."""
    wave = tl.arange(0, WAVES)[None, :]
    inside = there[:, None] & (wave < ROTARY // 2)
    waves_ptr += slot[:, None] * ROTARY + wave
    cos = tl.load(waves_ptr, mask=inside, other=0)
    sin = tl.load(waves_ptr + ROTARY // 2, mask=inside, other=0)
    # scores of a long bias are large: their error has to be that of float32
    found = tl.dot(cos, vectors[0], input_precision="tf32x3")
    return tl.dot(sin, vectors[1], found, input_precision="tf32x3")


@triton.jit
def _chunk(
    start_ptr, length_ptr, batch, capacity, sinks, window, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the first coded slot of a sequence, and which slots this program takes."""
    length = tl.minimum(tl.load(length_ptr).to(tl.int32), capacity) - window
    first = tl.load(start_ptr + batch) + sinks
    origin = first // BLOCK * BLOCK
    chunk = tl.cdiv(tl.cdiv(tl.maximum(length - origin, 0), splits), BLOCK) * BLOCK
    begin = origin + tl.program_id(1) * chunk
    return first, begin, tl.minimum(begin + chunk, length)


@triton.jit
def _over_slots(
    k_levels, k_ptr, k_scale_ptr, k_zero_ptr, v_levels, v_ptr, v_scale_ptr, v_zero_ptr,
    waves_ptr, first, begin, end, capacity, q, query_sum, factors, vectors, D: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, K_MIDDLE: tl.constexpr,
    V_MIDDLE: tl.constexpr, K_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr, ROTARY: tl.constexpr, WAVES: tl.constexpr,
):  # fmt: skip
    """Sum over begin..end-1; the largest weight times its scale is 2^_ROOM.

    Returns weighted values of each nibble, (PAIRS, HEADS), the exponent of the largest weight and
    the sum of weights, both (HEADS,).
    """
    pair, inner = tl.arange(0, PAIRS), tl.arange(0, BLOCK)
    real = pair < D // 4
    empty = tl.zeros((PAIRS, HEADS), tl.float32)
    out = (empty, empty, empty, empty)
    most = tl.full((HEADS,), LEAST, tl.float32)
    total = tl.zeros((BLOCK, HEADS), tl.float32)  # of weights
    zeros = tl.zeros((BLOCK, HEADS), tl.float32)  # of weights times scales and zero points
    # scales and zero points are read one turn ahead
    slot = tl.multiple_of(begin, BLOCK) + inner
    inside = (begin < end) & (EVEN | (slot < capacity))
    sk, zk = parameters(k_scale_ptr, k_zero_ptr, slot, inside, K_MIDDLE)
    sv, zv = parameters(v_scale_ptr, v_zero_ptr, slot, inside, V_MIDDLE)
    for at in range(begin, end, BLOCK):
        at = tl.multiple_of(at, BLOCK)
        slot = at + inner
        there = EVEN | (slot < capacity)
        place = slot[:, None] * (D // 4) + pair[None, :]
        k = tl.load(k_ptr + place, mask=there[:, None] & real[None, :], other=0)
        place = pair[:, None] + slot[None, :] * (D // 4)
        v = tl.load(v_ptr + place, mask=real[:, None] & there[None, :], other=0)
        coming = tl.multiple_of(at + BLOCK, BLOCK) + inner
        inside = (at + BLOCK < end) & (EVEN | (coming < capacity))
        next_sk, next_zk = parameters(k_scale_ptr, k_zero_ptr, coming, inside, K_MIDDLE)
        next_sv, next_zv = parameters(v_scale_ptr, v_zero_ptr, coming, inside, V_MIDDLE)

        found = product(k, q, k_levels, K_LEVELS, WIDE, FAST) - zk[:, None] * query_sum[None, :]
        valid = (slot >= first) & (slot < end)
        found = found * (sk[:, None] * factors[None, :])
        if WAVES > 0:
            found += of_bias(waves_ptr, slot, there & valid, vectors, ROTARY, WAVES)
        scores = tl.where(valid[:, None], found, -float("inf"))
        size = tl.log2(tl.maximum(sv, _SMALLEST_SCALE))
        new = tl.maximum(most, tl.max(scores + size[:, None], 0) - _ROOM)
        shrink = tl.exp2(most - new)[None, :]
        weights = tl.exp2(scores - new[None, :])
        scaled = (weights * tl.where(valid, sv, 0.0)[:, None]).to(q[0].dtype)
        total = total * shrink + weights
        # as rounded: then rounding errors of levels and zero points cancel
        zeros = zeros * shrink + scaled.to(tl.float32) * zv[:, None]
        out = add(out, v, v_levels, scaled, shrink, V_LEVELS, WIDE, FAST)
        most, sk, sv, zk, zv = new, next_sk, next_sv, next_zk, next_zv
    return levels_of_floats(out, tl.sum(zeros, 0), V_LEVELS, WIDE), most, tl.sum(total, 0)


@triton.jit(do_not_specialize=["sinks", "window", "splits", "parts"])
def attend_kernel(
    query_ptr, k_levels_ptr, k_ptr, k_scale_ptr, k_zero_ptr, v_levels_ptr, v_ptr, v_scale_ptr,
    v_zero_ptr, start_ptr, length_ptr, sums_ptr, most_ptr, total_ptr, out_ptr, vectors_ptr,
    waves_ptr, factor, capacity, sinks, window, splits, parts, kv_heads, query_batch, query_head,
    wave_batch, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, K_MIDDLE: tl.constexpr, V_MIDDLE: tl.constexpr,
    K_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr, ROTARY: tl.constexpr, WAVES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from up to HEADS of the GROUP query heads of a KV head to one part of its slots.

    WHOLE: the part is all there is, and the result is written. Otherwise each of the splits, which
    are the first of the parts, writes its weighted sum (in the order of nibbles), its maximum and
    its sum of weights. Neither the first slots, so many sinks, nor those of the window are read.
    factor: scaling·log2(e). WAVES: a power of two from ROTARY/2 on where biases of keys add to
    scores, else 0. Slots are rows of matrices and query heads their columns: a product
    with 8 columns wastes least.
    """
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    owner = tl.program_id(0) // PARTS
    batch, head = owner // kv_heads, owner % kv_heads
    member = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    taken = (pair < D // 4)[:, None] & (member < GROUP)[None, :]
    slots = _chunk(start_ptr, length_ptr, batch, capacity, sinks, window, splits, BLOCK)
    base = owner.to(tl.int64) * capacity
    query_ptr += batch.to(tl.int64) * query_batch + (head * GROUP + member)[None, :] * query_head
    q, query_sum, factors = queries(query_ptr, pair, taken, factor, D, K_LEVELS, WIDE)
    row = owner * GROUP + member
    vectors = q
    if WAVES > 0:
        vectors = vectors_of(vectors_ptr, row.to(tl.int64), member < GROUP, factor, ROTARY, WAVES)
    k_levels = table(k_levels_ptr, K_LEVELS, WIDE)
    v_levels = table(v_levels_ptr, V_LEVELS, WIDE)
    if FAST and not WIDE:
        k_levels = words(k_levels) if K_LEVELS > 0 else k_levels
        v_levels = words(v_levels) if V_LEVELS > 0 else v_levels
    out, most, total = _over_slots(
        k_levels, k_ptr + base * (D // 4), k_scale_ptr + base, k_zero_ptr + base, v_levels,
        v_ptr + base * (D // 4), v_scale_ptr + base, v_zero_ptr + base,
        waves_ptr + batch.to(tl.int64) * wave_batch, *slots, capacity, q, query_sum, factors,
        vectors, D, HEADS, PAIRS, BLOCK, K_MIDDLE, V_MIDDLE, K_LEVELS, V_LEVELS, WIDE, EVEN, FAST,
        ROTARY, WAVES,
    )  # fmt: skip
    if WHOLE:
        norm = (1 / tl.maximum(total, NOTHING))[None, :]
        kind = out_ptr.dtype.element_ty
        out_ptr += row.to(tl.int64)[None, :] * D
        for index in tl.static_range(4):
            place = out_ptr + places(pair, index, D)[:, None]
            tl.store(place, (out[index] * norm).to(kind), mask=taken)
    else:
        place = row * parts + tl.program_id(1)
        tl.store(most_ptr + place, most, mask=member < GROUP)
        tl.store(total_ptr + place, total, mask=member < GROUP)
        sums_ptr += place.to(tl.int64)[None, :] * D + pair[:, None]
        for index in tl.static_range(4):
            tl.store(sums_ptr + index * (D // 4), out[index], mask=taken)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    sums_ptr, most_ptr, total_ptr, out_ptr, splits, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add what the splits found for one query head, and put the numbers in their order."""
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    there = split < splits
    most = tl.load(most_ptr + row * splits + split, mask=there, other=LEAST)
    total = tl.load(total_ptr + row * splits + split, mask=there, other=0.0)
    place = (row.to(tl.int64) * splits + split)[:, None] * D + d[None, :]
    sums = tl.load(sums_ptr + place, mask=there[:, None] & (d < D)[None, :], other=0.0)
    share = tl.exp2(most - tl.max(most, 0))
    found = tl.sum(share[:, None] * sums, 0) / tl.maximum(tl.sum(share * total, 0), NOTHING)
    place = places(d % (D // 4), d // (D // 4), D)
    out_ptr += row.to(tl.int64) * D
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=d < D)
