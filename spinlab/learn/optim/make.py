"""The optimizers of rotations and their learning-rate schedules, by name.

An optimizer here is a function (groups, settings) -> torch.optim.Optimizer on groups of parameters
from `on_manifold`: (..., n, n) orthogonal matrices. Gradients are tangent: all but one project them
or see their tangent part only, but geoopt's RiemannianSGD starts its momentum from the gradient as
it is. A step size means different things: that of riemannian_adam is the Frobenius length of a
matrix's step (its second moment is one number per matrix), that of qr_adam the length of each
latent entry's.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import geoopt
import torch

from spinlab.config import LearnConfig
from spinlab.config.checks import choice
from spinlab.learn.optim.cayley import CayleyAdam, CayleySGD, cayley_exact
from spinlab.learn.optim.qr import QRSGD, QRAdam

Groups = list[dict[str, Any]]

_geoopt = cast(Any, geoopt.optim)  # decorated, so that type checkers cannot follow

OPTIMIZERS: Mapping[str, Callable[[Groups, LearnConfig], torch.optim.Optimizer]] = {
    "cayley_sgd": lambda groups, x: CayleySGD(groups, x.lr, x.momentum, x.cap_step),
    "cayley_exact": lambda groups, x: CayleySGD(groups, x.lr, x.momentum, x.cap_step, cayley_exact),
    "cayley_adam": lambda groups, x: CayleyAdam(groups, x.lr, cap_step=x.cap_step),
    "riemannian_sgd": lambda groups, x: _geoopt.RiemannianSGD(groups, lr=x.lr, momentum=x.momentum),
    "riemannian_adam": lambda groups, x: _geoopt.RiemannianAdam(groups, lr=x.lr),
    "qr_sgd": lambda groups, x: QRSGD(groups, x.lr, x.momentum),
    "qr_adam": lambda groups, x: QRAdam(groups, x.lr),
}

# factors of the base rate, by the share of the steps after warm-up that is done
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def make_optimizer(groups: Groups, learn: LearnConfig) -> torch.optim.Optimizer:
    """Make the optimizer that `learn` names, for parameters from `on_manifold`."""
    return OPTIMIZERS[learn.optimizer](groups, learn)


def rate_at(learn: LearnConfig, step: int) -> float:
    """Return the factor of the base rate at a step: linear warm-up, then the schedule."""
    if step < learn.warmup:
        return (step + 1) / learn.warmup
    done = (step - learn.warmup) / max(1, learn.steps - learn.warmup)
    return SCHEDULES[learn.schedule](done)


def check_optimizer(learn: LearnConfig) -> None:
    """Raise InputError for an optimizer or a schedule that is not in the tables."""
    choice("learn.optimizer", learn.optimizer, tuple(OPTIMIZERS))
    choice("learn.schedule", learn.schedule, tuple(SCHEDULES))
