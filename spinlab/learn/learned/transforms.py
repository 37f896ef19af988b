"""What a linear's input and its weight go through: T and T*, as functions of what is learned.

A linear computes T(x) T*(W)ᵀ = x Wᵀ, where T divides by a scale and then does one of three things:
nothing more, rotate in blocks, or rotate in blocks, permute and rotate in blocks again
(`spinlab.rotation.inputs.ScaledDual`). T* multiplies by the scale. A scale that is folded leaves
through what produces x, and T itself is without it. A scale alone is a rotation in blocks of 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spinlab.rotation.blocks import rotate_blocks
from spinlab.rotation.online import OnlineRotation


def scaled(
    first: torch.Tensor, log_scale: torch.Tensor, folded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first rotations of T and of T*, the scale in their rows: (..., k, b, b) each.

    first: (..., k, b, b); log_scale: (..., k·b). Second rotations are the same in both.
    """
    rows = log_scale.view(*first.shape[:-1], 1)
    return first if folded else first * (-rows).exp(), first * rows.exp()


def scaled_gradients(
    first: torch.Tensor,
    log_scale: torch.Tensor,
    of_input: torch.Tensor,
    of_weight: torch.Tensor,
    folded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `scaled`'s arguments, given those of its results, in their shapes."""
    rows = log_scale.view(*first.shape[:-1], 1)
    at_input, at_weight = scaled(first, log_scale, folded)
    of_rows, of_first = of_weight * at_weight, of_weight * rows.exp()
    if folded:
        return of_input + of_first, of_rows.sum(-1).flatten(-2)
    of_rows = of_rows - of_input * at_input
    return of_input * (-rows).exp() + of_first, of_rows.sum(-1).flatten(-2)


@dataclass(eq=False)
class BlockTransform:
    """Rotate in blocks, permute, and rotate in blocks again: x ↦ (x first)[permutation] second.

    first, second: (k, b, b); permutation and its inverse: (in,). With a leading n in all of them
    they are n transforms. The last three may be missing, together. behind: a rotation that is not
    learned, and comes last.
    """

    first: torch.Tensor
    second: torch.Tensor | None = None
    permutation: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    behind: OnlineRotation | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Transform x: (..., in), or n of x: (n, rows, in) each by its own, in their own dtype."""
        x = _rotate(x, self.first)
        if self.second is not None:
            permuted = _Permute.apply(x, self.permutation, self.inverse)
            x = _rotate(permuted, self.second)  # type: ignore[arg-type]
        return x if self.behind is None else self.behind(x)

    def at(self, places: int | list[int]) -> "BlockTransform":
        """Return one of n transforms, whose rotations are views, or copies of several."""
        stacks = self.first, self.second, self.permutation, self.inverse
        parts = (None if stack is None else stack[places] for stack in stacks)
        return BlockTransform(*parts, behind=self.behind)  # type: ignore[arg-type]

    @property
    def rotations(self) -> list[torch.Tensor]:
        """The first rotation and, if there is one, the second."""
        return [self.first] if self.second is None else [self.first, self.second]

    def with_rotations(self, rotations: Sequence[torch.Tensor]) -> "BlockTransform":
        """Return the same with other `rotations`, as many."""
        names = ("first", "second")
        return replace(self, **dict(zip(names, rotations, strict=False)))


def _rotate(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply the blocks of x by (k, b, b), or those of x[i] (rows, in) by blocks[i]."""
    if blocks.shape[-1] == 1:
        factors = blocks.to(x.dtype).flatten(-3)
        return x * (factors if blocks.dim() == 3 else factors[:, None])
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
