"""The Triton kernel behind `spinlab.runtime.kernels.matmul.launch`."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.tiles import tile_of

_GROUP = tl.constexpr(16)  # columns of tiles that are taken together


@triton.jit
def _columns(ptr, row, rows, begin, at, width, BLOCK: tl.constexpr, BK: tl.constexpr):
    """Return levels of some rows, (n, BK), of a block's columns from `at` on."""
    column = at + tl.arange(0, BK)
    inside = (row < rows)[:, None]
    if BLOCK % BK:
        inside = inside & (column < BLOCK)[None, :]
    place = row.to(tl.int64)[:, None] * width + (begin + column)[None, :]
    return tl.load(ptr + place, mask=inside, other=0), inside


@triton.jit
def _products(
    found, rest, x_ptr, w_ptr, m, n, tokens, out, block, at, width, BLOCK: tl.constexpr,
    BK: tl.constexpr, UNSIGNED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Add the products of some columns of a block, and where weights have ZEROS their levels."""
    x, inside = _columns(x_ptr, m, tokens, block * BLOCK, at, width, BLOCK, BK)  # pyright: ignore[reportGeneralTypeIssues]
    w, _ = _columns(w_ptr, n, out, block * BLOCK, at, width, BLOCK, BK)  # pyright: ignore[reportGeneralTypeIssues]
    if UNSIGNED:  # signed, a byte is 128 less
        x = (x ^ 128).to(tl.int8, bitcast=True)
        x = tl.where(inside, x, 0)
    if ZEROS:
        rest += tl.sum(x.to(tl.int32), 1)
    return tl.dot(x, tl.trans(w), found, out_dtype=tl.int32), rest


@triton.jit
def outputs_kernel(
    x_ptr, w_ptr, y_ptr, s_ptr, z_ptr, t_ptr, c_ptr, u_ptr, bias_ptr, tokens, out, blocks, many,
    BLOCK: tl.constexpr, UNSIGNED: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute a tile (BM tokens, BN outputs); the arguments are those of `outputs`.

    many: blocks that share the scale and zero point of an input.
    """
    wait_for_inputs(PDL)
    row, column = tile_of(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(out, BN), _GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    width, groups = blocks * BLOCK, blocks // many
    total = tl.zeros((BM, BN), tl.float32)
    for block in tl.range(0, blocks):
        found = tl.zeros((BM, BN), tl.int32)
        rest = tl.zeros((BM,), tl.int32)
        if BLOCK <= 2 * BK:  # what is within a loop keeps it from loading ahead
            for at in tl.static_range(0, BLOCK, BK):
                found, rest = _products(
                    found, rest, x_ptr, w_ptr, m, n, tokens, out, block, at, width, BLOCK, BK,
                    UNSIGNED, ZEROS,
                )  # fmt: skip
        else:
            for at in tl.range(0, BLOCK, BK):
                found, rest = _products(
                    found, rest, x_ptr, w_ptr, m, n, tokens, out, block, at, width, BLOCK, BK,
                    UNSIGNED, ZEROS,
                )  # fmt: skip
        of_token, of_output = m * groups + block // many, block * out + n
        z = tl.load(z_ptr + of_token, mask=m < tokens, other=0)
        if UNSIGNED:
            z -= 128
        c = tl.load(c_ptr + of_output, mask=n < out, other=0)
        found -= z[:, None] * c[None, :]
        if ZEROS:
            u = tl.load(u_ptr + of_output, mask=n < out, other=0)
            found -= (rest - BLOCK * z)[:, None] * u[None, :]
        s = tl.load(s_ptr + of_token, mask=m < tokens, other=0.0)
        t = tl.load(t_ptr + of_output, mask=n < out, other=0.0)
        total += found.to(tl.float32) * (s[:, None] * t[None, :])
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < out, other=0.0)[None, :]
    place = m.to(tl.int64)[:, None] * out + n[None, :]
    inside = (m < tokens)[:, None] & (n < out)[None, :]
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)
