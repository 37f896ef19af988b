"""The Triton kernel for many tokens that multiplies by gate and up at once, and gates."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from spinlab.runtime.kernels.linear.triton import (
    add_zeros,
    of_outputs,
    of_tokens,
    tile_at,
    times_16,
    with_bias,
)
from spinlab.runtime.kernels.overlap import wait_for_inputs
from spinlab.runtime.kernels.producers.triton import gated


@triton.jit
def _added(acc, packed, first, second, ASM: tl.constexpr):
    """Return acc (out, tokens) and the products of packed weights with both tiles of inputs."""
    low, high = times_16(packed, ASM)  # pyright: ignore[reportGeneralTypeIssues]
    acc = tl.dot(low, first.T, acc, out_dtype=tl.int32)
    return tl.dot(high, second.T, acc, out_dtype=tl.int32)


@triton.jit
def _scaled(
    acc, m, n, tokens, out, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr, bias_ptr, WIDTH: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return what 16 times integers stand for, in float32."""
    acc = add_zeros(
        acc >> 4, m, n, tokens, out, 0, z_ptr, a_ptr, u_ptr, c_ptr, 1, WIDTH, 1, 1, 1, ZEROS
    )  # fmt: skip
    total = acc.to(tl.float32) * of_tokens(s_ptr, m, tokens, 0, 1) * of_outputs(t_ptr, n, out, 0, 1)
    return with_bias(total, bias_ptr, n, out, BIAS)


@triton.jit(do_not_specialize=["tokens"])
def gate_kernel(
    x_tiles, w_tiles, y_tiles, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr, bias_ptr, tokens, channels,
    HALF: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute tiles (BM tokens, BN channels) of silu(gate)·up, as `prefill_kernel` does products.

    w_tiles are of gate's rows and, behind them, up's; each has one block of 2·HALF columns.
    """
    wait_for_inputs(PDL)
    rows, columns = tl.cdiv(tokens, BM), tl.cdiv(channels, BN)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        row, column = tile_at(tile, rows, columns, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
        m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
        gate, up = tl.zeros((BN, BM), tl.int32), tl.zeros((BN, BM), tl.int32)
        for at in tl.range(0, HALF, BK, num_stages=STAGES):
            first, second = x_tiles.load([row * BM, at]), x_tiles.load([row * BM, HALF + at])
            gate = _added(gate, w_tiles.load([column * BN, at]), first, second, ASM)
            up = _added(up, w_tiles.load([channels + column * BN, at]), first, second, ASM)
        found = _scaled(
            gate, m, n, tokens, channels, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr, bias_ptr,
            2 * HALF, ZEROS, BIAS,
        )  # fmt: skip
        other = _scaled(
            up, m, channels + n, tokens, 2 * channels, s_ptr, z_ptr, a_ptr, t_ptr, u_ptr, c_ptr,
            bias_ptr, 2 * HALF, ZEROS, BIAS,
        )  # fmt: skip
        y = gated(found.to(y_tiles.dtype), other.to(y_tiles.dtype), ASM)
        y_tiles.store([row * BM, column * BN], tl.trans(y))
