"""The Triton kernel behind `launch`.

A head of D numbers is held as its two halves: RoPE pairs one with the other where it turns the
whole head, and byte j of a packed row takes number j of each.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.formats.integer_kernels import parameters_of
from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.producers.triton import MAGIC, levels_of

_TINY = tl.constexpr(1e-30)  # a head of zeros has no direction
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _product(x, y, kind: tl.constexpr):
    """Multiply as 16-bit tensors do: round, and go on in float32."""
    return (x * y).to(kind).to(tl.float32)


@triton.jit
def _rotary(
    x_ptr, cos_ptr, sin_ptr, own, other, at, d, inside, D: tl.constexpr, ROTARY: tl.constexpr
):
    """Return numbers d of heads after RoPE, in float32; own and other: as loaded, d and d ± D/2.

    x_ptr, at: where heads and their angles begin. `other` serves where all numbers turn.
    """
    kind = x_ptr.dtype.element_ty
    turns = inside & (d < ROTARY)
    cos = tl.load(cos_ptr + at + d, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at + d, mask=turns, other=0.0).to(tl.float32)
    if ROTARY < D:
        partner = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
        other = tl.load(x_ptr + partner, mask=turns, other=0.0).to(tl.float32)
    across = tl.where(d < ROTARY // 2, -other, other)
    return (_product(own, cos, kind) + _product(across, sin, kind)).to(kind).to(tl.float32)


@triton.jit
def _quarter(r3_ptr, ROW: tl.constexpr, COLUMN: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Load one quarter of R3: (HALF, HALF), zero outside."""
    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    place = (row + ROW * (D // 2)) * D + column + COLUMN * (D // 2)
    return tl.load(r3_ptr + place, mask=(row < D // 2) & (column < D // 2), other=0.0)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, r3_ptr, at, inside, r3_scale, D: tl.constexpr, HALF: tl.constexpr,
    ROTARY: tl.constexpr, R3: tl.constexpr,
):  # fmt: skip
    """Return both halves of queries or keys after RoPE and R3, rounded after each, in float32."""
    kind = x_ptr.dtype.element_ty
    d = tl.arange(0, HALF)[None, :]
    x = tl.load(x_ptr + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + d + D // 2, mask=inside, other=0.0).to(tl.float32)
    low = _rotary(x_ptr, cos_ptr, sin_ptr, x, y, at, d, inside, D, ROTARY)
    high = _rotary(x_ptr, cos_ptr, sin_ptr, y, x, at, d + D // 2, inside, D, ROTARY)
    if R3:
        factor = r3_ptr.dtype.element_ty
        x, y = low.to(factor), high.to(factor)
        low = tl.dot(x, _quarter(r3_ptr, 0, 0, D, HALF), input_precision="tf32x3")
        low = tl.dot(y, _quarter(r3_ptr, 1, 0, D, HALF), low, input_precision="tf32x3")
        high = tl.dot(x, _quarter(r3_ptr, 0, 1, D, HALF), input_precision="tf32x3")
        high = tl.dot(y, _quarter(r3_ptr, 1, 1, D, HALF), high, input_precision="tf32x3")
        low = (low * r3_scale).to(kind).to(tl.float32)
        high = (high * r3_scale).to(kind).to(tl.float32)
    return low, high


@triton.jit
def _on_grid(
    low, high, zero_ptr, place, inside, clip, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Return nibbles of both halves and a scale for rows, and write their zero points."""
    SYMMETRIC: tl.constexpr = LOWEST < 0
    # beyond the head there are zeros, which every range contains
    lowest, highest = tl.min(tl.minimum(low, high), 1), tl.max(tl.maximum(low, high), 1)
    scale, zero = parameters_of(lowest, highest, clip, HIGHEST, SYMMETRIC, True)
    if not SYMMETRIC:
        tl.store(zero_ptr + place, zero.to(tl.uint8), mask=inside)
    wide = scale[:, None]
    n_low = levels_of(low, wide, zero[:, None], LOWEST, HIGHEST, LOWEST, FUSED)
    n_high = levels_of(high, wide, zero[:, None], LOWEST, HIGHEST, LOWEST, FUSED)
    minus = (zero - LOWEST)[:, None]
    return n_low, n_high, scale, n_low.to(tl.float32) - minus, n_high.to(tl.float32) - minus


@triton.jit
def _place(unit, between_ptr, MANY: tl.constexpr):
    """Return how many ends of cells lie below numbers."""
    found = tl.zeros(unit.shape, tl.int32)
    for index in tl.static_range(MANY - 1):
        found += (unit > tl.load(between_ptr + index)).to(tl.int32)
    return found


@triton.jit
def _by_levels(
    low, high, levels_ptr, between_ptr, D: tl.constexpr, HALF: tl.constexpr, MANY: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """Return nibbles of both halves, a length for rows, and the levels, zero beyond the head."""
    norm = tl.sqrt_rn(tl.sum(low * low, 1) + tl.sum(high * high, 1))
    held = tl.zeros_like(low) + tl.maximum(norm, _TINY)[:, None]
    n_low = _place(_settled(tl.math.div_rn(low, held)), between_ptr, MANY)
    n_high = _place(_settled(tl.math.div_rn(high, held)), between_ptr, MANY)
    real = (tl.arange(0, HALF) < D // 2)[None, :]
    c_low = tl.where(real, tl.load(levels_ptr + n_low), 0.0)
    c_high = tl.where(real, tl.load(levels_ptr + n_high), 0.0)
    square = tl.sum(c_low * c_low, 1) + tl.sum(c_high * c_high, 1)
    product = tl.sum(c_low * low, 1) + tl.sum(c_high * high, 1)
    length = norm
    if LENGTH == 1:
        length = norm / tl.sqrt_rn(square)
    elif LENGTH == 2:
        length = product / square
    elif LENGTH == 3:
        length = norm * (norm / tl.maximum(product, _TINY))
    length = tl.minimum(tl.maximum(length, -_LARGEST_HALF), _LARGEST_HALF)
    return n_low, n_high, length.to(tl.float16).to(tl.float32), c_low, c_high


@triton.jit
def _settled(unit):
    """Round numbers of at most 1 to multiples of 2^-16."""
    return (unit * 65536.0 + MAGIC - MAGIC) * (1 / 65536.0)


@triton.jit
def _copy(low, high, ptr, row, inside, D: tl.constexpr, HALF: tl.constexpr):
    """Write both halves of heads to rows, where `inside`."""
    kind = ptr.dtype.element_ty
    d = tl.arange(0, HALF)[None, :]
    inside = inside[:, None] & (d < D // 2)
    ptr += row[:, None] * D + d
    tl.store(ptr, low.to(kind), mask=inside)
    tl.store(ptr + D // 2, high.to(kind), mask=inside)


@triton.jit
def _keep(
    low, high, ptr, owner, nth, slot, sinks, window, new, late, D: tl.constexpr, HALF: tl.constexpr
):
    """Write heads to where sinks and the newest tokens are in floats (`floats.FloatTokens`).

    owner: sequence and head; nth: in its sequence; new: heads that are there; late: of tokens that
    none behind them overwrites.
    """
    first = owner * (sinks + window)
    ring = first + sinks + slot % tl.maximum(window, 1)
    _copy(low, high, ptr, ring, new & late, D, HALF)
    _copy(low, high, ptr, first + nth, new & (nth >= 0) & (nth < sinks), D, HALF)


@triton.jit
def _write(
    low, high, levels_ptr, between_ptr, packed_ptr, scale_ptr, zero_ptr, round_ptr, place, new,
    inside, clip, D: tl.constexpr, HALF: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, MANY: tl.constexpr, LENGTH: tl.constexpr, ROUND: tl.constexpr,
    FLOATS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Code rows and write them at `place`, and what they hold at row `new`, where `inside`.

    MANY: how many levels there are, or 0 for a grid. FLOATS: not what they hold, but they.
    """
    if ROUND and FLOATS:
        _copy(low, high, round_ptr, new, inside, D, HALF)
    if MANY > 0:
        n_low, n_high, scale, low, high = _by_levels(  # pyright: ignore[reportGeneralTypeIssues]
            low, high, levels_ptr, between_ptr, D, HALF, MANY, LENGTH
        )
    else:
        n_low, n_high, scale, low, high = _on_grid(  # pyright: ignore[reportGeneralTypeIssues]
            low, high, zero_ptr, place, inside, clip, LOWEST, HIGHEST, FUSED
        )
    tl.store(scale_ptr + place, scale.to(tl.float16), mask=inside)
    d = tl.arange(0, HALF)[None, :]
    there, inside = inside, inside[:, None] & (d < D // 2)
    packed_ptr += place[:, None] * (D // 2) + d
    tl.store(packed_ptr, (n_low | (n_high << 4)).to(tl.uint8), mask=inside)
    if ROUND and not FLOATS:
        _copy(low * scale[:, None], high * scale[:, None], round_ptr, new, there, D, HALF)


@triton.jit(do_not_specialize=["batches", "tokens", "heads", "kv_heads", "sinks", "window"])
def store_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, r3_ptr, position_ptr, queries_ptr, k_levels_ptr,
    k_between_ptr, k_packed_ptr, k_scale_ptr, k_zero_ptr, k_round_ptr, v_levels_ptr, v_between_ptr,
    v_packed_ptr, v_scale_ptr, v_zero_ptr, v_round_ptr, k_floats_ptr, v_floats_ptr, start_ptr,
    batches, tokens, heads, kv_heads, capacity, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, angle_batch, sinks, window, r3_scale, k_clip, v_clip,
    D: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, STEP: tl.constexpr, R3: tl.constexpr,
    K_LOWEST: tl.constexpr, K_HIGHEST: tl.constexpr, K_MANY: tl.constexpr, K_LENGTH: tl.constexpr,
    V_LOWEST: tl.constexpr, V_HIGHEST: tl.constexpr, V_MANY: tl.constexpr, V_LENGTH: tl.constexpr,
    ROUND: tl.constexpr, FLOATS: tl.constexpr, FUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Do STEP heads of `store`: those of queries come first, then keys, then values.

    FLOATS: the first tokens and the newest are kept in floats, and returned as such with ROUND.
    Heads are counted within tokens and tokens within sequences, as they lie in memory.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    of_queries = tl.cdiv(batches * tokens * heads, STEP)
    of_keys = tl.cdiv(batches * tokens * kv_heads, STEP)
    is_query = program < of_queries
    is_value = program >= of_queries + of_keys
    count = tl.where(is_query, heads, kv_heads)
    program -= tl.where(is_query, 0, tl.where(is_value, of_queries + of_keys, of_queries))
    row = program * STEP + tl.arange(0, STEP)
    head, token = row % count, (row // count % tokens).to(tl.int64)
    batch = (row // count // tokens).to(tl.int64)
    there = batch < batches
    inside = there[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
    at = (batch * angle_batch + token * ROTARY)[:, None]
    new = (batch * count + head) * tokens + token
    slot = tl.load(position_ptr) + token
    owner = batch * kv_heads + head
    place = owner * capacity + slot
    fits = there & (slot < capacity)
    late, nth = token >= tokens - window, slot
    if FLOATS:
        nth = slot - tl.load(start_ptr + batch, mask=there, other=0)
    d = tl.arange(0, HALF)[None, :]
    if is_query:
        x_ptr = q_ptr + (batch * q_batch + token * q_token + head * q_head)[:, None]
        low, high = _turn(
            x_ptr, cos_ptr, sin_ptr, r3_ptr, at, inside, r3_scale, D, HALF, ROTARY, R3
        )
        kind = queries_ptr.dtype.element_ty
        to = queries_ptr + row.to(tl.int64)[:, None] * D + d
        tl.store(to, low.to(kind), mask=inside)
        tl.store(to + D // 2, high.to(kind), mask=inside)
    elif is_value:
        x_ptr = v_ptr + (batch * v_batch + token * v_token + head * v_head)[:, None]
        low = tl.load(x_ptr + d, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(x_ptr + d + D // 2, mask=inside, other=0.0).to(tl.float32)
        if FLOATS:
            _keep(
                low, high, v_floats_ptr, owner, nth, slot, sinks, window, fits, late, D, HALF
            )  # fmt: skip
        _write(
            low, high, v_levels_ptr, v_between_ptr, v_packed_ptr, v_scale_ptr, v_zero_ptr,
            v_round_ptr, place, new, fits, v_clip, D, HALF, V_LOWEST, V_HIGHEST, V_MANY, V_LENGTH,
            ROUND, FLOATS, FUSED,
        )  # fmt: skip
    else:
        x_ptr = k_ptr + (batch * k_batch + token * k_token + head * k_head)[:, None]
        low, high = _turn(
            x_ptr, cos_ptr, sin_ptr, r3_ptr, at, inside, r3_scale, D, HALF, ROTARY, R3
        )
        if FLOATS:
            _keep(
                low, high, k_floats_ptr, owner, nth, slot, sinks, window, fits, late, D, HALF
            )  # fmt: skip
        _write(
            low, high, k_levels_ptr, k_between_ptr, k_packed_ptr, k_scale_ptr, k_zero_ptr,
            k_round_ptr, place, new, fits, k_clip, D, HALF, K_LOWEST, K_HIGHEST, K_MANY, K_LENGTH,
            ROUND, FLOATS, FUSED,
        )  # fmt: skip
