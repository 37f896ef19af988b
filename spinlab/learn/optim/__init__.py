"""Optimizers on the manifold of rotations, and their schedules."""

from spinlab.learn.optim.base import RotationOptimizer, on_manifold, tangent
from spinlab.learn.optim.make import (
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    make_optimizer,
    rate_at,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "RotationOptimizer",
    "check_optimizer",
    "make_optimizer",
    "on_manifold",
    "rate_at",
    "tangent",
]
