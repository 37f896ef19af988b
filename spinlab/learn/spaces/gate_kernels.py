"""The Triton kernels behind `spinlab.learn.spaces.gates`."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _places(rows, WIDTH: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's columns (1, BLOCK), where its numbers lie, and which are there."""
    row = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return column, row * WIDTH + column, (row < rows) & (column < WIDTH)


@triton.jit
def _parts(gate, up, factor, place, there, column, WIDTH: tl.constexpr, SCALED: tl.constexpr):
    """Return gate, its sigmoid, up, up scaled and the factor; float32, as 16 bits round them."""
    kind = gate.dtype.element_ty
    g = tl.load(gate + place, there, 0.0).to(tl.float32)
    u = tl.load(up + place, there, 0.0).to(tl.float32)
    f = tl.zeros_like(u) + 1.0
    if SCALED:
        f *= tl.load(factor + column, column < WIDTH, 1.0).to(kind).to(tl.float32)
    return g, 1.0 / (1.0 + tl.exp(-g)), u, (u * f).to(kind).to(tl.float32), f


@triton.jit
def gate_kernel(
    gate, up, factor, out, rows, WIDTH: tl.constexpr, SCALED: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column, place, there = _places(  # pyright: ignore[reportGeneralTypeIssues]
        rows, WIDTH, STEP, BLOCK
    )
    g, sigmoid, _, scaled, _ = _parts(gate, up, factor, place, there, column, WIDTH, SCALED)
    kind = out.dtype.element_ty
    tl.store(out + place, ((g * sigmoid).to(kind).to(tl.float32) * scaled).to(kind), there)


@triton.jit
def gate_gradient_kernel(
    gate, up, factor, gradient, of_gate, of_up, sums, rows, WIDTH: tl.constexpr,
    SCALED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write both gradients, and what a program's rows add to the factor's: (programs, WIDTH)."""
    column, place, there = _places(  # pyright: ignore[reportGeneralTypeIssues]
        rows, WIDTH, STEP, BLOCK
    )
    g, sigmoid, u, scaled, f = _parts(gate, up, factor, place, there, column, WIDTH, SCALED)
    kind = gate.dtype.element_ty
    d = tl.load(gradient + place, there, 0.0).to(tl.float32)
    of_scaled = (d * (g * sigmoid).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    of_silu = (d * scaled).to(kind).to(tl.float32)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(of_gate + place, (of_silu * slope).to(kind), there)
    tl.store(of_up + place, (of_scaled * f).to(kind), there)
    if SCALED:
        part = tl.sum(of_scaled * u, 0, keep_dims=True)
        tl.store(sums + tl.program_id(0) * WIDTH + column, part, column < WIDTH)
