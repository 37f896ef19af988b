"""Activations rotated by a learned rotation, and the gradient that a step on the manifold needs.

Along R ← exp(A) R, with A skew-symmetric, the loss changes by <M, A>. M is called the generator
here. Generators that agree along the manifold differ by a symmetric matrix H + Hᵀ. The Euclidean
gradient, (M + H + Hᵀ) R, is that of a network whose weights are made with R as a free matrix
(`spinlab.learn.spaces.definition`); it is needed only where its norm is asked for. Each function
below hands its M, and on demand its H, to a sink, in float32 or wider, and never forms a gradient
of R in the network's dtype.
"""

from collections.abc import Callable

import torch

from spinlab.formats.quantizer import TokenQuantizer
from spinlab.learn.learned import Sink


def rotate(
    x: torch.Tensor, rotation: torch.Tensor, anchor: torch.Tensor, sink: Sink
) -> torch.Tensor:
    """Return x (I ⊗ R): x (..., k·n), R (n, n) in x's dtype.

    anchor: any tensor that requires a gradient exactly if R is learned; it receives none.
    """
    return _Rotate.apply(x, rotation, anchor, sink)  # type: ignore[no-any-return]


def rotate_back(
    x: torch.Tensor, rotation: torch.Tensor, anchor: torch.Tensor, sink: Sink
) -> torch.Tensor:
    """Return x (I ⊗ Rᵀ): x (..., k·n), with the arguments of `rotate`."""
    return _RotateBack.apply(x, rotation, anchor, sink)  # type: ignore[no-any-return]


def round_rotated(
    x: torch.Tensor,
    rotation: torch.Tensor,
    anchor: torch.Tensor,
    sink: Sink,
    quantizer: TokenQuantizer,
    see: Callable[[torch.Tensor], None] | None = None,
    normed: bool = True,
) -> torch.Tensor:
    """Return Q(x R) Rᵀ for x (..., n): quantized in R's basis, handed on in the original one.

    Taken as x + E Rᵀ with the rounding error E = Q(y) - y, y = x R: a 16-bit R then only blurs the
    error. With a straight-through gradient g passes to x as it is, because R Rᵀ = I, and
    M = -(E Rᵀ)ᵀ g: one product backward where autograd would take four. `see` is shown y. Where H
    is asked for, x is a norm's output as in `read_normed`, whose H is part of this one; or it is
    not `normed`, but a product with one that was accounted for by itself.
    """
    return _RoundRotated.apply(x, rotation, anchor, sink, quantizer, see, normed)  # type: ignore[no-any-return]


def read_normed(x: torch.Tensor, anchor: torch.Tensor, sink: Sink) -> torch.Tensor:
    """Return x = (x R) Rᵀ: (..., n), an RMSNorm's output read as it is, which has no M but an H.

    Beside the reader's own use of R this answers for the uses before it. The stream s = Σ v R sums
    what the embedding and the linears write, so that the uses in them have Σ vᵀ g R, with g the
    gradient where v is added. Regrouped by who reads the stream that is Σ sᵀ d, with d what a
    reader hands back through its norm: sᵀ d = xᵀ (g - x (x·g)/n). The reader has gᵀ x, and both
    together H + Hᵀ for H = xᵀ (g - ½ x (x·g)/n).
    """
    return _Read.apply(x, anchor, sink, _half_of_normed)  # type: ignore[no-any-return]


def read_stream(x: torch.Tensor, anchor: torch.Tensor, sink: Sink) -> torch.Tensor:
    """Return x = (x R) Rᵀ: (..., n), the stream with no norm between: H = xᵀ g (`read_normed`)."""
    return _Read.apply(x, anchor, sink, _outer)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
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
            ctx.sink.add(_outer(x, back, rotation.shape[0]))
        return back, None, None, None


class _RotateBack(torch.autograd.Function):
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
            generator = _outer(out, gradient, rotation.shape[0]).neg_()
            ctx.sink.add(generator)
            if ctx.sink.add_half is not None:  # the Euclidean gradient is -Mᵀ R
                ctx.sink.add_half(generator.neg_())
        return _rows_times(gradient, rotation), None, None, None


class _RoundRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotation, anchor, sink, quantizer, see, normed):
        y = _rows_times(x, rotation)
        if see is not None:
            see(y)
        error = _rows_times(quantizer.error(y), rotation.mT)
        ctx.save_for_backward(error, x if normed and sink.add_half is not None else None)
        ctx.sink, ctx.width = sink, rotation.shape[0]
        return x + error

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        error, x = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            generator = _outer(error, gradient, ctx.width).neg_()
            ctx.sink.add(generator)
            if x is not None:
                ctx.sink.add_half(_half_of_normed(x, gradient, ctx.width).sub_(generator))
            elif ctx.sink.add_half is not None:
                ctx.sink.add_half(generator.neg())
        return gradient, None, None, None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, sink, half):
        ctx.save_for_backward(x)
        ctx.sink, ctx.half = sink, half
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (x,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.sink.add_half(ctx.half(x, gradient, x.shape[-1]))
        return gradient, None, None, None


def _rows_times(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return (x.reshape(-1, rotation.shape[0]) @ rotation).view(x.shape)


def _half_of_normed(x: torch.Tensor, gradient: torch.Tensor, width: int) -> torch.Tensor:
    """Return H of `read_normed`: (width, width), in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    along = (x * gradient).sum(-1, keepdim=True, dtype=wide) / (2 * width)
    return _outer(x, gradient - x * along.to(x.dtype), width)


def _outer(a: torch.Tensor, b: torch.Tensor, width: int) -> torch.Tensor:
    """Return Σ aᵀ b over rows of `width`: (width, width), in float32 or wider."""
    a, b = a.reshape(-1, width), b.reshape(-1, width)
    if a.dtype.itemsize > 2:
        return a.mT @ b
    if a.is_cuda:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.mT.float() @ b.float()
