"""Parameters on the manifold of rotations, and the step that our own optimizers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import geoopt
import torch
from torch import nn


def on_manifold(rotation: torch.Tensor) -> nn.Parameter:
    """Make a parameter of (..., n, n) orthogonal matrices, with the Euclidean metric of geoopt."""
    # geoopt makes its classes with __new__ and decorators that type checkers cannot follow
    manifold = cast(Any, geoopt.Stiefel)(canonical=False)
    return cast(Any, geoopt.ManifoldParameter)(rotation, manifold=manifold)


def tangent(point: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
    """Return the Riemannian gradient ½ (M - Mᵀ) R at R, for a Euclidean one M R: (..., n, n)."""
    return 0.5 * (generator - generator.mT) @ point


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
        """Move one parameter, in place, by its gradient and the settings of its group.

        p, gradient: (..., n, n).
        """
