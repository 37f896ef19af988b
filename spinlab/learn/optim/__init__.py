"""Optimizers on the manifold of rotations, and their schedules."""

from spinlab.learn.optim.base import RotationOptimizer, on_manifold, tangent
from spinlab.learn.optim.make import (
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    make_optimizer,
    rate_at,
    unread_by_optimizer,
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
    "unread_by_optimizer",
]
