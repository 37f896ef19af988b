"""The optimizers of rotations and their learning-rate schedules, by name.

An optimizer here is called with groups of parameters from `on_manifold`, (..., n, n) orthogonal
matrices, with lr, and with those settings of `learn.optimizer` that its parameters name. Gradients
are tangent: all but one project them or see their tangent part only, but geoopt's RiemannianSGD
starts its momentum from the gradient as it is. A step size means different things: that of
riemannian_adam is the Frobenius length of a matrix's step (its second moment is one number per
matrix), that of qr_adam the length of each latent entry's.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from inspect import signature
from typing import Any, cast

import geoopt
import torch

from spinlab.config import LearnConfig, OptimizerConfig
from spinlab.config.checks import choice
from spinlab.config.unread import Rule
from spinlab.learn.optim.cayley import CayleyAdam, CayleySGD, cayley_exact
from spinlab.learn.optim.qr import QRSGD, QRAdam

Groups = list[dict[str, Any]]

_geoopt = cast(Any, geoopt.optim)  # decorated, so that type checkers cannot follow

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "cayley_sgd": CayleySGD,
    "cayley_exact": partial(CayleySGD, transform=cayley_exact),
    "cayley_adam": CayleyAdam,
    "riemannian_sgd": _geoopt.RiemannianSGD,
    "riemannian_adam": _geoopt.RiemannianAdam,
    "qr_sgd": QRSGD,
    "qr_adam": QRAdam,
}

# factors of the base rate, by the share of the steps after warm-up that is done
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def make_optimizer(groups: Groups, learn: LearnConfig) -> torch.optim.Optimizer:
    """Make the optimizer that `learn` names, for parameters from `on_manifold`."""
    settings = {name: getattr(learn.optimizer, name) for name in _reads(learn.optimizer.name)}
    return OPTIMIZERS[learn.optimizer.name](groups, lr=learn.lr.r1, **settings)


def _reads(name: str) -> set[str]:
    """Name the settings that an optimizer reads beside the rates."""
    return {f.name for f in fields(OptimizerConfig)} & signature(OPTIMIZERS[name]).parameters.keys()


def unread_by_optimizer(chosen: OptimizerConfig) -> Iterator[Rule]:
    """Yield, as `spinlab.config.unread` does, what other optimizers read than the chosen one."""
    check_optimizer(chosen)
    others = set().union(*map(_reads, OPTIMIZERS)) - _reads(chosen.name)
    yield f"learn.optimizer.name={chosen.name}", [f"learn.optimizer.{name}" for name in others]


def rate_at(learn: LearnConfig, step: int) -> float:
    """Return the factor of the base rate at a step: linear warm-up, then the schedule."""
    warmup = learn.optimizer.warmup
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[learn.optimizer.schedule]((step - warmup) / max(1, learn.steps - warmup))


def check_optimizer(chosen: OptimizerConfig) -> None:
    """Raise InputError for an optimizer or a schedule that is not in the tables."""
    choice("learn.optimizer.name", chosen.name, tuple(OPTIMIZERS))
    choice("learn.optimizer.schedule", chosen.schedule, tuple(SCHEDULES))
