"""Cayley SGD on orthogonal matrices (Li, Li & Todorovic 2020, algorithm 1), as SpinQuant uses it.

geoopt has no optimizer of this kind: its retractions solve a linear system or take a QR, and its
step has no cap. Differences from the published code are stated where they are.
"""

from collections.abc import Callable, Iterable

import torch

_FIXED_POINT_ITERATIONS = 5
_SMALL = 1e-8


class CayleySGD(torch.optim.Optimizer):
    """Move along the Cayley transform of a skew generator, with a cap on the step.

    Parameters are (..., n, n) orthogonal matrices; leading dimensions are independent matrices,
    each with its own cap. `momentum` adds up generators as algorithm 1 adds up gradients; in the
    published code its buffer was never written. Instead of a QR that strikes with probability
    1/101 the caller projects at fixed steps (`spinlab.learn.loop`).
    """

    def __init__(
        self, params: Iterable, lr: float, momentum: float = 0.0, cap_step: bool = True
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "cap_step": cap_step})

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
                    self._move(p, group)
        return loss

    def _move(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        assert p.grad is not None
        skew = skew_generator(p, p.grad)
        if group["momentum"]:
            # kept as a generator: W R is tangent at any R, so the average moves with the point
            skew = skew + group["momentum"] * state.get("momentum_buffer", 0)
            state["momentum_buffer"] = skew
        norm = skew.abs().sum(-2).amax(-1)  # the largest absolute column sum, ||W||_1
        lr = torch.full_like(norm, group["lr"])
        alpha = torch.minimum(lr, 1 / (norm + _SMALL)) if group["cap_step"] else lr
        state["alpha"], state["capped"] = alpha, alpha < lr
        p.copy_(cayley_fixed_point(p, skew, alpha[..., None, None]))


def skew_generator(point: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return W with the descent step R ← C(-αW) R: (..., n, n), skew-symmetric.

    W = Ŵ - Ŵᵀ with Ŵ = G Rᵀ - ½ R (Rᵀ G Rᵀ) (SpinQuant eq. 3), which projects the gradient G on
    the tangent space at R.
    """
    gr = direction @ point.mT
    hat = gr - 0.5 * point @ (point.mT @ gr)
    return hat - hat.mT


def cayley_fixed_point(
    point: torch.Tensor, skew: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Return the Cayley transform (I + α/2 W)⁻¹ (I - α/2 W) R by five fixed-point iterations.

    Y ← R - α/2 W (R + Y) contracts by at most α||W||/2 an iteration; under the cap by at most ½.
    """
    half = alpha / 2 * skew
    base = point - half @ point
    y = point - alpha * skew @ point
    for _ in range(_FIXED_POINT_ITERATIONS):
        y = base - half @ y
    return y


def cayley_exact(point: torch.Tensor, skew: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the same Cayley transform by solving its linear system."""
    eye = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    half = alpha / 2 * skew
    return torch.linalg.solve(eye + half, (eye - half) @ point)
