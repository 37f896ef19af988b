"""The Triton kernel behind `launch` for tokens that are in floats."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.attention.triton import LEAST, of_bias, vectors_of
from spinlab.runtime.kernels.attention.triton_rows import order
from spinlab.runtime.kernels.overlap import wait_for_inputs


@triton.jit
def _tokens(place, begins, length, sinks, window):
    """Return the slots of places, and whether a token is read there (`FloatTokens.slots`)."""
    # never below 0, where remainders would have signs
    back = (length - 1 + window - (place - sinks)) % tl.maximum(window, 1)
    slot = tl.where(place < sinks, begins + place, length - 1 - back)
    in_window = (place < sinks + window) & (slot >= begins + sinks)
    return slot, tl.where(place < sinks, slot < length, in_window)


@triton.jit
def _added(v, weights, WIDE: tl.constexpr):
    """Return values (BLOCK, D) times weights (BLOCK, HEADS), which 16 bits hold as two numbers."""
    high = weights.to(v.dtype)
    found = tl.dot(tl.trans(v), high, input_precision="tf32x3")
    if not WIDE:
        rest = (weights - high.to(tl.float32)).to(v.dtype)
        found = tl.dot(tl.trans(v), rest, found)
    return found


@triton.jit(do_not_specialize=["sinks", "window", "splits", "parts"])
def floats_kernel(
    query_ptr, k_ptr, v_ptr, start_ptr, length_ptr, sums_ptr, most_ptr, total_ptr, vectors_ptr,
    waves_ptr, factor, sinks, window, splits, parts, kv_heads, query_batch, query_head, wave_batch,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr, WAVES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attend from up to HEADS of the GROUP query heads of a KV head to BLOCK places of its floats.

    What is found goes behind that of the splits of `attend_kernel`, in the same order of numbers.
    """
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    owner = tl.program_id(0) // PARTS
    batch, head = owner // kv_heads, owner % kv_heads
    member = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    number = tl.arange(0, BLOCK_D)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(length_ptr).to(tl.int32)
    slot, there = _tokens(place, tl.load(start_ptr + batch), length, sinks, window)
    inside = there[:, None] & (number < D)[None, :]
    row = owner.to(tl.int64) * (sinks + window) + place
    k = tl.load(k_ptr + row[:, None] * D + number[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + row[:, None] * D + number[None, :], mask=inside, other=0.0)
    taken = (number < D)[:, None] & (member < GROUP)[None, :]
    query_ptr += batch.to(tl.int64) * query_batch + (head * GROUP + member)[None, :] * query_head
    q = tl.load(query_ptr + number[:, None], mask=taken, other=0.0)
    found = tl.dot(k, q, input_precision="tf32x3") * factor
    row = owner * GROUP + member
    if WAVES > 0:
        vectors = vectors_of(vectors_ptr, row.to(tl.int64), member < GROUP, factor, ROTARY, WAVES)
        waves_ptr += batch.to(tl.int64) * wave_batch
        found += of_bias(waves_ptr, slot, there, vectors, ROTARY, WAVES)
    scores = tl.where(there[:, None], found, -float("inf"))
    most = tl.maximum(tl.max(scores, 0), LEAST)
    weights = tl.exp2(scores - most[None, :])
    to = row * parts + splits + tl.program_id(1)
    tl.store(most_ptr + to, most, mask=member < GROUP)
    tl.store(total_ptr + to, tl.sum(weights, 0), mask=member < GROUP)
    sums_ptr += to.to(tl.int64)[None, :] * D + order(number, D)[:, None]
    tl.store(sums_ptr, _added(v, weights, WIDE), mask=taken)
