"""The Triton kernels for few tokens behind `launch`, and for many on GPUs without room for tiles.

Of few tokens the weights' bytes are the time. Programs share an output tile by splitting its
columns; the last of them to finish adds the parts up, always in the same order.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.linear.triton import (
    add_block,
    add_zeros,
    as_floats,
    of_outputs,
    of_tokens,
    times_16,
    with_added,
    with_bias,
)
from spinlab.runtime.kernels.overlap import bring_lines, wait_for_inputs
from spinlab.runtime.kernels.tiles import tile_of


@triton.jit
def _tiles(
    x_ptr, w_ptr, m, n, tokens, out, block, at, IN: tl.constexpr, HALF: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Load packed weights (BN, BK) and the two tiles of inputs (BM, BK) that meet them."""
    k = at + tl.arange(0, BK)
    inside = k < HALF
    row = tl.minimum(n, out - 1).to(tl.int64) * (IN // 2) + block * HALF
    packed = tl.load(
        w_ptr + row[:, None] + k[None, :], mask=inside[None, :], other=0,
        eviction_policy="evict_first",
    )  # fmt: skip
    place = m[:, None] * IN + (2 * block * HALF + k)[None, :]
    inside = (m < tokens)[:, None] & inside[None, :]
    first = tl.load(x_ptr + place, mask=inside, other=0)
    second = tl.load(x_ptr + place + HALF, mask=inside, other=0)
    return packed, first, second


@triton.jit
def _first_lines(w_ptr, n, out, at, IN: tl.constexpr):
    """Point at byte `at` of rows n of packed weights, or at the last one where there is none."""
    row = tl.minimum(n, out - 1).to(tl.int64) * (IN // 2)
    return w_ptr + row + tl.minimum(at, IN // 2 - 1)


@triton.jit
def _sum_parts(found, part_ptr, count_ptr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Leave this program's part; return whether it was the last one, and then the sum of all.

    Counters are zero before and after.
    """
    tile, size = tl.program_id(0), tl.num_programs(0) * BN * BM
    place = (tile * BN + tl.arange(0, BN))[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(part_ptr + tl.program_id(1) * size + place, found)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        found = tl.zeros_like(found)
        for other in tl.static_range(SPLIT):  # from the cache that all multiprocessors share
            found += tl.load(part_ptr + other * size + place, cache_modifier=".cg")
        tl.store(count_ptr + tile, 0)
    return last, found


@triton.jit(do_not_specialize=["tokens"])
def decode_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr, bias_ptr, added_ptr, part_ptr,
    count_ptr, tokens, out, IN: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
    INPUT_GROUPS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Compute BN outputs of BM tokens from levels; the grid is (tiles, SPLIT).

    ADDED: they are added to others (tokens, out), after they are rounded. GROUP: of more than BM
    tokens, how many tiles of outputs are taken side by side (`tile_of`); 0 where there are no more.

    Of one block the columns are split, of several the blocks. Of several, BK divides HALF.
    """
    part, row, column = tl.program_id(1), 0, tl.program_id(0)
    if GROUP:
        row, column = tile_of(  # pyright: ignore[reportGeneralTypeIssues]
            column, tl.cdiv(tokens, BM), tl.cdiv(out, BN), GROUP
        )
        x_ptr += (row * BM).to(tl.int64) * IN
    first_row, n = row * BM, column * BN + tl.arange(0, BN)
    each: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    steps: tl.constexpr = (HALF + BK * SPLIT - 1) // (BK * SPLIT)
    own: tl.constexpr = steps * BK if BLOCKS == 1 else each * HALF
    bring_lines(_first_lines(w_ptr, n, out, part * own, IN), PDL)
    wait_for_inputs(PDL)
    m, here = first_row + tl.arange(0, BM), tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.int32)
    if BLOCKS == 1:
        for step in tl.range(part * steps, (part + 1) * steps, num_stages=STAGES):
            packed, first, second = _tiles(
                x_ptr, w_ptr, here, n, tokens - first_row, out, 0, step * BK, IN, HALF, BK
            )
            low, high = times_16(packed, ASM)
            acc = tl.dot(low, first.T, acc, out_dtype=tl.int32)
            acc = tl.dot(high, second.T, acc, out_dtype=tl.int32)
        found = acc
    else:
        found = tl.zeros((BN, BM), tl.float32)
        for block in tl.range(part * each, min(part * each + each, BLOCKS), num_stages=STAGES):
            acc = add_zeros(
                tl.zeros((BN, BM), tl.int32), m, n, tokens, out, block, z_ptr, a_ptr, u_ptr,
                c_ptr, 16, 2 * HALF, BLOCKS, INPUT_GROUPS, WEIGHT_GROUPS, ZEROS,
            )  # fmt: skip
            for at in tl.static_range(0, HALF, BK):
                packed, first, second = _tiles(
                    x_ptr, w_ptr, here, n, tokens - first_row, out, block, at, IN, HALF, BK
                )
                low, high = times_16(packed, ASM)
                acc = tl.dot(low, first.T, acc, out_dtype=tl.int32)
                acc = tl.dot(high, second.T, acc, out_dtype=tl.int32)
            found = add_block(
                found, acc, m, n, tokens, out, block, s_ptr, t_ptr, BLOCKS, INPUT_GROUPS,
                WEIGHT_GROUPS,
            )  # fmt: skip
    last = True
    if SPLIT > 1:
        last, found = _sum_parts(found, part_ptr, count_ptr, SPLIT, BM, BN)
    if last:
        if BLOCKS == 1:
            found = add_zeros(
                found >> 4, m, n, tokens, out, 0, z_ptr, a_ptr, u_ptr, c_ptr, 1, 2 * HALF, 1, 1, 1,
                ZEROS,
            )  # fmt: skip
            total = found.to(tl.float32) * of_tokens(s_ptr, m, tokens, 0, 1)
        else:
            total = found
        if WEIGHT_GROUPS == 1:
            total *= of_outputs(t_ptr, n, out, 0, 1)
        total = with_bias(total, bias_ptr, n, out, BIAS)
        _store(y_ptr, total, added_ptr, m, n, first_row, column * BN, tokens, out, ADDED)


@triton.jit(do_not_specialize=["tokens"])
def decode16_kernel(
    x_ptr, w_ptr, y_ptr, t_ptr, u_ptr, bias_ptr, added_ptr, part_ptr, count_ptr, tokens, out,
    IN: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Do the same from inputs that are floats; every block is a group of the weight."""
    part = tl.program_id(1)
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    per: tl.constexpr = (HALF + BK - 1) // BK
    steps: tl.constexpr = (BLOCKS * per + SPLIT - 1) // SPLIT
    begin = part * steps // per * HALF + part * steps % per * BK
    bring_lines(_first_lines(w_ptr, n, out, begin, IN), PDL)
    wait_for_inputs(PDL)
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(part * steps, min((part + 1) * steps, BLOCKS * per), num_stages=STAGES):
        block = step // per
        packed, first, second = _tiles(
            x_ptr, w_ptr, m, n, tokens, out, block, step % per * BK, IN, HALF, BK
        )
        if not ASM:  # the interpreter has no bfloat16 products
            first, second = first.to(tl.float32), second.to(tl.float32)
        low, high = as_floats(packed, first.dtype, ASM)
        if ZEROS:
            u = tl.load(u_ptr + n * BLOCKS + block, mask=n < out, other=0).to(first.dtype)[:, None]
            low, high = low - u, high - u
        if BLOCKS == 1:
            total = tl.dot(low, first.T, total, input_precision="ieee")
            total = tl.dot(high, second.T, total, input_precision="ieee")
        else:
            found = tl.dot(low, first.T, input_precision="ieee")
            found = tl.dot(high, second.T, found, input_precision="ieee")
            total += found * of_outputs(t_ptr, n, out, block, BLOCKS)
    if BLOCKS == 1:
        total *= of_outputs(t_ptr, n, out, 0, 1)
    last = True
    if SPLIT > 1:
        last, total = _sum_parts(total, part_ptr, count_ptr, SPLIT, BM, BN)
    if last:
        total = with_bias(total, bias_ptr, n, out, BIAS)
        _store(y_ptr, total, added_ptr, m, n, 0, tl.program_id(0) * BN, tokens, out, ADDED)


@triton.jit
def _store(y_ptr, total, added_ptr, m, n, row, column, tokens, out, ADDED: tl.constexpr):
    y = tl.trans(total.to(y_ptr.dtype.element_ty))
    y = with_added(y, added_ptr, row, column, tokens, out, ADDED)
    inside = (m < tokens)[:, None] & (n < out)[None, :]
    tl.store(y_ptr + m[:, None].to(tl.int64) * out + n[None, :], y, mask=inside)
