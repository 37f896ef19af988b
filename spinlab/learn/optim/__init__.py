"""Optimizers on the manifold of rotations, and their schedules."""

from spinlab.learn.optim.base import RotationOptimizer, on_manifold, tangent
from spinlab.learn.optim.make import (
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    make_optimizer,
    rate_at,
)
from spinlab.learn.optim.qr import orthogonal_factor

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "RotationOptimizer",
    "check_optimizer",
    "make_optimizer",
    "on_manifold",
    "orthogonal_factor",
    "rate_at",
    "tangent",
]
