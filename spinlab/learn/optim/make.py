"""The optimizers of rotations by name, all on groups of (..., n, n) orthogonal parameters."""

from collections.abc import Callable
from functools import partial
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
    optim = cast(Any, geoopt.optim)
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "cayley_sgd": CayleySGD,
        "cayley_exact": partial(CayleySGD, transform=cayley_exact),
        "cayley_adam": CayleyAdam,
        "riemannian_sgd": optim.RiemannianSGD,
        "riemannian_adam": optim.RiemannianAdam,
        "qr_sgd": QRSGD,
        "qr_adam": QRAdam,
    }
    return makers[learn.optimizer](groups, lr=learn.lr, **learn.optimizer_settings)
