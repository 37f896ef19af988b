"""Terms of the loss that look at single rotated activations: no backpropagation through layers."""

from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks

from spinlab.config import ObjectiveConfig
from spinlab.formats.integer import at_least_float32
from spinlab.learn.learned import LearnedRotations
from spinlab.learn.objectives import ACTIVATION_TERMS


class LocalTerms:
    """Take terms on activations where these are rotated, and their gradients with them."""

    def __init__(self, objective: ObjectiveConfig, rotations: LearnedRotations) -> None:
        self.rotations = rotations
        weights = objective.weights
        self.weights = {name: weights[name] for name in ACTIVATION_TERMS if weights.get(name)}
        self.places = 0
        self.share = 0.0  # of the batch; 0 while activation checkpointing reruns a layer
        self.totals: dict[str, torch.Tensor] = {}

    def watch(self, name: str, layer: int) -> Callable[[torch.Tensor], None] | None:
        """Return a function of rotated activations y = x R (..., n); None if no term sees them."""
        if not self.weights or name not in self.rotations.parameters:
            return None
        self.places += 1

        def see(y: torch.Tensor) -> None:
            if self.share:
                self._take(y.detach(), name, layer)

        return see

    def _take(self, y: torch.Tensor, name: str, layer: int) -> None:
        held = self.rotations.all[name]
        assert held is not None
        point = held.detach() if name == "r1" else held.detach()[layer]
        rows = at_least_float32(y).reshape(-1, point.shape[0])
        total = torch.zeros((), dtype=rows.dtype, device=rows.device)
        # hooks of its own: recomputation, which does not come here, counts the tensors of others
        with torch.enable_grad(), saved_tensors_hooks(_keep, _keep):
            leaf = rows.requires_grad_()
            for kind, weight in self.weights.items():
                term = ACTIVATION_TERMS[kind](leaf) * (self.share / self.places)
                self.totals[kind] = self.totals.get(kind, 0) + term.detach()
                total = total + weight * term
            (gradient,) = torch.autograd.grad(total, leaf)
        with torch.no_grad():
            # for rows x = y Rᵀ the generator is xᵀ (dy Rᵀ)
            self.rotations.sink(name, layer).add(point @ (rows.mT @ gradient) @ point.mT)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
