"""Cayley SGD on orthogonal matrices (Li, Li & Todorovic 2020, algorithm 1), as SpinQuant uses it.

geoopt has no optimizer of this kind: its retractions solve a linear system or take a QR, and its
step has no cap. SpinQuant's published code takes the same step with these differences:

- it steps on the transpose, so that its cap is 1/||W||_1 of Rᵀ W R; steps below it are the same;
- its fixed point starts off the tangent, at Rᵀ - α Gᵀ: five iterations leave (α||W||/2)⁵ of that,
  which is nothing for small steps and up to 2⁻⁵ of α G at the cap;
- it scales the rows of R to norm 1 at every step, and with probability 1/101 takes a QR of R; here
  the caller projects at fixed steps (`spinlab.learn.loop`);
- its momentum buffer is never written, so that any momentum is 0.
"""

from collections.abc import Callable, Iterable

import torch

from spinlab.learn.optim.base import RotationOptimizer

_FIXED_POINT_ITERATIONS = 5
_SMALL = 1e-8

# (point, skew, alpha) -> next point: (..., n, n) each, alpha (..., 1, 1)
Transform = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CayleySGD(RotationOptimizer):
    """Move along the Cayley transform of a skew generator, with a cap on the step.

    Parameters are (..., n, n) orthogonal matrices; leading dimensions are independent matrices,
    each with its own cap. `momentum` adds up generators as algorithm 1 adds up gradients.
    `transform` takes the step: `cayley_fixed_point` as in the paper, or `cayley_exact`, which
    stays orthogonal without a cap.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        cap_step: bool = True,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "cap_step": cap_step})
        self.transform = transform or cayley_fixed_point

    def _move(self, p: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        skew = skew_generator(p, gradient)
        if group["momentum"]:
            # kept as a generator: W R is tangent at any R, so the average moves with the point
            skew = skew + group["momentum"] * state.get("momentum_buffer", 0)
            state["momentum_buffer"] = skew
        alpha = _step_size(skew, group, state)
        p.copy_(self.transform(p, skew, alpha))


class CayleyAdam(RotationOptimizer):
    """Cayley ADAM (Li et al. 2020, algorithm 2): one second moment for each matrix.

    The generator's average is divided by the root of its mean square, so that `lr` is about the
    root mean square entry of a step's generator, whatever the loss's scale.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        cap_step: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "cap_step": cap_step})

    def _move(self, p: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        skew = skew_generator(p, gradient)
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(skew)
            state["exp_avg_sq"] = torch.zeros_like(skew[..., :1, :1])
        state["step"] += 1
        state["exp_avg"].lerp_(skew, 1 - beta1)
        state["exp_avg_sq"].lerp_(skew.square().mean((-1, -2), keepdim=True), 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        direction = mean / (square.sqrt() + torch.finfo(skew.dtype).tiny)
        p.copy_(cayley_fixed_point(p, direction, _step_size(direction, group, state)))


def _step_size(skew: torch.Tensor, group: dict, state: dict) -> torch.Tensor:
    """Return the step (..., 1, 1), capped at 1/||W||_1 if the group asks for it; note it down."""
    norm = skew.abs().sum(-2).amax(-1)  # the largest absolute column sum, ||W||_1
    lr = torch.full_like(norm, group["lr"])
    alpha = torch.minimum(lr, 1 / (norm + _SMALL)) if group["cap_step"] else lr
    state["alpha"], state["capped"] = alpha, alpha < lr
    return alpha[..., None, None]


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

    point R and skew W: (..., n, n); alpha: (..., 1, 1).
    Y ← R - α/2 W (R + Y) contracts by at most α||W||/2 an iteration; under the cap by at most ½.
    """
    half = alpha / 2 * skew
    base = point - half @ point
    y = point - alpha * skew @ point
    for _ in range(_FIXED_POINT_ITERATIONS):
        y = base - half @ y
    return y


def cayley_exact(
    point: torch.Tensor, skew: torch.Tensor, alpha: torch.Tensor | float
) -> torch.Tensor:
    """Return the same Cayley transform, (..., n, n), by solving one linear system per matrix.

    The system is never singular, since W has imaginary eigenvalues. Solved for the displacement,
    R - (I + α/2 W)⁻¹ αW R, rounding is relative to the step: in float32 thirty steps at width 512
    leave max|RRᵀ-I| at 7e-8, against 7e-6 when solved for the next point.
    """
    eye = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    return point - torch.linalg.solve(eye + alpha / 2 * skew, alpha * skew @ point)
