"""Activations turned by a learned rotation, and the gradient that a step on the manifold needs.

Along R ← exp(A) R, with A skew-symmetric, the loss changes by <M, A>. M is called the generator
here; M R is one of the Euclidean gradients that agree along the manifold. Each function below hands
its M to a sink, in float32 or wider, and never forms a gradient of R in the network's dtype.
"""

from collections.abc import Callable

import torch

from spinlab.quant.inputs import TokenQuantizer

Sink = Callable[[torch.Tensor], None]


def turn(x: torch.Tensor, rotation: torch.Tensor, anchor: torch.Tensor, sink: Sink) -> torch.Tensor:
    """Return x (I ⊗ R): x (..., k·n), R (n, n) in x's dtype.

    anchor: any tensor that requires a gradient exactly if R is learned; it receives none.
    """
    return _Turn.apply(x, rotation, anchor, sink)  # type: ignore[no-any-return]


def turn_back(
    x: torch.Tensor, rotation: torch.Tensor, anchor: torch.Tensor, sink: Sink
) -> torch.Tensor:
    """Return x (I ⊗ Rᵀ), with the arguments of `turn`."""
    return _TurnBack.apply(x, rotation, anchor, sink)  # type: ignore[no-any-return]


def round_turned(
    x: torch.Tensor,
    rotation: torch.Tensor,
    anchor: torch.Tensor,
    sink: Sink,
    quantizer: TokenQuantizer,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Return Q(x R) Rᵀ: quantized in the rotated basis, handed on in the original one.

    Taken as x + E Rᵀ with the rounding error E = Q(y) - y, y = x R: a 16-bit R then only blurs the
    error. With a straight-through gradient g passes to x as it is, because R Rᵀ = I, and
    M = -(E Rᵀ)ᵀ g: one product backward where autograd would take four. `see` is shown y.
    """
    return _RoundTurned.apply(x, rotation, anchor, sink, quantizer, see)  # type: ignore[no-any-return]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotation, anchor, sink):
        ctx.save_for_backward(x, rotation)
        ctx.sink = sink
        return _rows_times(x, rotation)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, rotation = ctx.saved_tensors
        back = _rows_times(gradient, rotation.mT)
        if ctx.needs_input_grad[2]:
            ctx.sink(_outer(x, back, rotation.shape[0]))
        return back, None, None, None


class _TurnBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotation, anchor, sink):
        out = _rows_times(x, rotation.mT)
        ctx.save_for_backward(out, rotation)
        ctx.sink = sink
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        out, rotation = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.sink(_outer(out, gradient, rotation.shape[0]).neg_())
        return _rows_times(gradient, rotation), None, None, None


class _RoundTurned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotation, anchor, sink, quantizer, see):
        y = _rows_times(x, rotation)
        if see is not None:
            see(y)
        error = _rows_times(quantizer.error(y), rotation.mT)
        ctx.save_for_backward(error)
        ctx.sink, ctx.width = sink, rotation.shape[0]
        return x + error

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (error,) = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.sink(_outer(error, gradient, ctx.width).neg_())
        return gradient, None, None, None, None, None


def _rows_times(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (x.reshape(-1, rotation.shape[0]) @ rotation).view(x.shape)


def _outer(a: torch.Tensor, b: torch.Tensor, width: int) -> torch.Tensor:
    """Return Σ aᵀ b over rows of `width`: (width, width), in float32 or wider."""
    a, b = a.reshape(-1, width), b.reshape(-1, width)
    if a.dtype.itemsize > 2:
        return a.mT @ b
    if a.is_cuda:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.mT.float() @ b.float()
