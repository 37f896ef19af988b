"""Stop a run whose loss explodes, and keep the rotations from before."""

import math
from collections.abc import Mapping

import torch

from spinlab.errors import InputError
from spinlab.learn.learned import part_of


class Divergence(InputError):
    """Say that learning diverged; `last_good` is what was learned at the last sound loss."""

    def __init__(self, sentence: str, last_good: dict[str, torch.Tensor]) -> None:
        super().__init__(sentence)
        self.last_good = last_good


class DivergenceCheck:
    """Compare every loss with the first one; `most`: the largest multiple of it that passes."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.first: float | None = None
        self.last_good: dict[str, torch.Tensor] = {}

    def check(
        self, step: int, loss: float, norm: float, numbers: Mapping[str, torch.Tensor]
    ) -> None:
        """Raise Divergence for a loss or gradient norm that is no number, or a loss too large.

        Otherwise remember the numbers that the loss belongs to.
        """
        first = loss if self.first is None else self.first
        if not (math.isfinite(loss) and math.isfinite(norm) and loss <= self.most * first):
            raise Divergence(
                f"learning diverged at step {step}: loss {loss:.4g} (at the start {first:.4g}), "
                f"gradient norm {norm:.4g}: lower learn.lr.r1, learn.lr.r2 or learn.lr.r3, set "
                "learn.optimizer.max_grad_norm, or raise learn.max_loss_ratio",
                self.last_good,
            )
        self.first = first
        self.last_good = {name: x.detach().clone() for name, x in numbers.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs."""
        if self.first is None:
            return {}
        kept = {f"divergence.good.{name}": matrix for name, matrix in self.last_good.items()}
        return {**kept, "divergence.first": torch.tensor(self.first, dtype=torch.float64)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned."""
        if "divergence.first" in tensors:
            self.first = tensors["divergence.first"].item()
            self.last_good = part_of(tensors, "divergence.good.")
