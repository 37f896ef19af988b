"""Learning-rate schedules as a factor of the base rate."""

import math

from spinlab.config import LearnConfig


def rate_at(learn: LearnConfig, step: int) -> float:
    """Return the factor at a step: linear warm-up, then constant, or falling to 0 at the end."""
    if step < learn.warmup:
        return (step + 1) / learn.warmup
    progress = (step - learn.warmup) / max(1, learn.steps - learn.warmup)
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return factors[learn.schedule]
