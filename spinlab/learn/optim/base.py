"""The step that our own optimizers of rotations share: one move per parameter with a gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class RotationOptimizer(torch.optim.Optimizer, ABC):
    """Move (..., n, n) orthogonal parameters; leading dimensions are independent matrices."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    @abstractmethod
    def _move(self, p: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        """Move one parameter, in place, by its gradient and the settings of its group."""
