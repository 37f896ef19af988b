"""The optimizers of rotations by name, all on groups of (..., n, n) orthogonal parameters."""

from typing import Any, cast

import geoopt
import torch
from torch import nn

from spinlab.config import LearnConfig
from spinlab.learn.optim.cayley import CayleyAdam, CayleySGD, cayley_exact
from spinlab.learn.optim.qr import QRSGD, QRAdam


def on_manifold(rotation: torch.Tensor) -> nn.Parameter:
    """Make a parameter of (..., n, n) orthogonal matrices, with the Euclidean metric of geoopt."""
    # geoopt makes its classes with __new__ and decorators that type checkers cannot follow
    manifold = cast(Any, geoopt.Stiefel)(canonical=False)
    return cast(Any, geoopt.ManifoldParameter)(rotation, manifold=manifold)


def tangent(point: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
    """Return the Riemannian gradient ½ (M - Mᵀ) R at R, for a Euclidean one M R: (..., n, n)."""
    return 0.5 * (generator - generator.mT) @ point


def make_optimizer(groups: list[dict[str, Any]], learn: LearnConfig) -> torch.optim.Optimizer:
    """Make the optimizer that `learn` names, for parameters from `on_manifold`.

    Gradients should be tangent: all but one project them or see their tangent part only, but
    geoopt's RiemannianSGD starts its momentum from the gradient as it is. A step size means
    different things: that of riemannian_adam is the Frobenius length of a matrix's step (its
    second moment is one number per matrix), that of qr_adam the length of each latent entry's.
    """
    lr, momentum, cap = learn.lr, learn.momentum, learn.cap_step
    geoopt_optim = cast(Any, geoopt.optim)
    makers = {
        "cayley_sgd": lambda: CayleySGD(groups, lr, momentum, cap),
        "cayley_exact": lambda: CayleySGD(groups, lr, momentum, cap, cayley_exact),
        "cayley_adam": lambda: CayleyAdam(groups, lr, cap_step=cap),
        "riemannian_sgd": lambda: geoopt_optim.RiemannianSGD(groups, lr=lr, momentum=momentum),
        "riemannian_adam": lambda: geoopt_optim.RiemannianAdam(groups, lr=lr),
        "qr_sgd": lambda: QRSGD(groups, lr, momentum),
        "qr_adam": lambda: QRAdam(groups, lr),
    }
    return makers[learn.optimizer]()
