"""Descent on a free matrix whose QR factor is the rotation (QR-Orth: DartQuant sec. 4.3).

R = Q(Z), the orthogonal factor of Z = Q U with a positive diagonal of U. Then Q = Z U⁻¹ is
unique and smooth while Z has full rank; the factor that LAPACK returns may flip any column
between two steps. Q is orthogonal to rounding after each step, however long. det R is det Z's
sign: far from the start Z can come near a singular matrix, where U⁻¹ makes gradients large, and
a step may leap over it and change the sign.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch

from spinlab.learn.optim.base import RotationOptimizer


class _LatentOptimizer(RotationOptimizer):
    """Keep a latent matrix for each rotation and move that.

    Parameters are (..., n, n) orthogonal matrices, and their gradients those with respect to R.
    The latent starts at R, where a step of SGD moves R twice as far as Riemannian SGD's; later
    steps depend on its lengths and condition too. Setting a parameter from outside lasts until the
    next step only.
    """

    def _move(self, p: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        if "latent" not in state:
            # geoopt's parameters remember their manifold, the latent has none
            state["latent"] = p.as_subclass(torch.Tensor).detach().clone()
        latent = state["latent"]
        direction = self._direction(state, latent_gradient(p, latent, gradient), group)
        latent.sub_(direction, alpha=group["lr"])
        p.copy_(orthogonal_factor(latent))

    @abstractmethod
    def _direction(self, state: dict, gradient: torch.Tensor, group: dict) -> torch.Tensor:
        """Return what the latent moves against, for its gradient."""


class QRSGD(_LatentOptimizer):
    """Move the latent by SGD with momentum, as torch.optim.SGD does."""

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def _direction(self, state: dict, gradient: torch.Tensor, group: dict) -> torch.Tensor:
        if group["momentum"]:
            gradient = gradient + group["momentum"] * state.get("momentum_buffer", 0)
            state["momentum_buffer"] = gradient
        return gradient


class QRAdam(_LatentOptimizer):
    """Move the latent by Adam, entry by entry, as torch.optim.Adam does."""

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _direction(self, state: dict, gradient: torch.Tensor, group: dict) -> torch.Tensor:
        first, second = group["betas"]
        step = state["step"] = state.get("step", 0) + 1
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, torch.zeros_like(gradient))
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        scale = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        return mean / (1 - first**step) / scale


def orthogonal_factor(latent: torch.Tensor) -> torch.Tensor:
    """Return the Q of (..., n, n) latents whose triangular factors have positive diagonals."""
    q, upper = torch.linalg.qr(latent)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs[..., None, :]


def latent_gradient(
    point: torch.Tensor, latent: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Pull a gradient G in R = Q(Z) back to Z = R U: R tril(RᵀG - GᵀR, -1) U⁻ᵀ, (..., n, n) each.

    Rᵀ dZ U⁻¹ is Rᵀ dR, which is skew, plus dU U⁻¹, which is upper triangular: what lies strictly
    below its diagonal fixes dR. Only the skew part of RᵀG enters, so that a gradient and its
    projection on the tangent space give the same.
    """
    rotated = point.mT @ gradient
    lower = (rotated - rotated.mT).tril_(-1)
    upper = (point.mT @ latent).triu_()
    # X U⁻ᵀ solves X' Uᵀ = X, a lower triangular system from the right
    return torch.linalg.solve_triangular(upper.mT, point @ lower, upper=False, left=False)
