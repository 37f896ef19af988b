"""What a linear's input and its weight go through: T and T*, as functions of what is learned.

A linear computes T(x) T*(W)ᵀ = x Wᵀ, where T divides by a scale, rotates in blocks, permutes and
rotates in blocks again (`spinlab.rotation.inputs.ScaledDual`), and T* multiplies by the scale.
"""

from dataclasses import dataclass
from typing import Any

import torch

from spinlab.rotation.duquant import rotate_blocks


def scaled(first: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first rotations of T and of T*, the scale in their rows: (..., k, b, b) each.

    first: (..., k, b, b); log_scale: (..., k·b). Second rotations are the same in both.
    """
    rows = log_scale.view(*first.shape[:-1], 1)
    return first * (-rows).exp(), first * rows.exp()


def scaled_gradients(
    first: torch.Tensor,
    log_scale: torch.Tensor,
    of_input: torch.Tensor,
    of_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `scaled`'s arguments, given those of its results, in their shapes."""
    rows = log_scale.view(*first.shape[:-1], 1)
    at_input, at_weight = scaled(first, log_scale)
    of_log_scale = (of_weight * at_weight - of_input * at_input).sum(-1).flatten(-2)
    return of_input * (-rows).exp() + of_weight * rows.exp(), of_log_scale


@dataclass(eq=False)
class BlockTransform:
    """Rotate in blocks, permute, and rotate in blocks again: x ↦ (x first)[permutation] second.

    first, second: (k, b, b); permutation and its inverse: (in,). With a leading n in all of them
    they are n transforms.
    """

    first: torch.Tensor
    second: torch.Tensor
    permutation: torch.Tensor
    inverse: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Transform x: (..., in), or n of x: (n, rows, in) each by its own, in their own dtype."""
        permuted = _Permute.apply(_rotate(x, self.first), self.permutation, self.inverse)
        return _rotate(permuted, self.second)  # type: ignore[arg-type]

    def at(self, places: int | list[int]) -> "BlockTransform":
        """Return one of n transforms, whose rotations are views, or copies of several."""
        parts = self.first, self.second, self.permutation, self.inverse
        return BlockTransform(*(part[places] for part in parts))


def _rotate(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply the blocks of x by (k, b, b), or those of x[i] (rows, in) by blocks[i]."""
    if blocks.dim() == 3:
        return rotate_blocks(x, blocks)
    tiles = x.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("nrkb,nkbc->nrkc", tiles, blocks.to(x.dtype)).flatten(-2)


class _Permute(torch.autograd.Function):
    """Permute the last dimension; backward with the inverse permutation, which is fast and exact.

    autograd's own way adds up by index, and in deterministic mode sorts for it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, permutation: torch.Tensor, inverse: torch.Tensor):
        ctx.save_for_backward(inverse)
        return _permuted(x, permutation)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (inverse,) = ctx.saved_tensors
        return _permuted(gradients[0], inverse), None, None


def _permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return x[..., order], or for order (n, in) and x (n, rows, in) each x[i] by its own."""
    if order.dim() == 1:
        return x.index_select(-1, order)
    return x.gather(-1, order[:, None].expand(x.shape))
