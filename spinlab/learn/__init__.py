"""Learning rotations, the transforms of inputs, and ranges, against the quantized network.

`loop` does a step. What the network computes is one of the `spaces`: `activations` where weights
stay in 16 bits, `weights` where they are rounded in the loop, `definition` what both must equal.
`learned` holds what is learned and makes of what a space hands in Riemannian gradients for an
optimizer of `optim`, clipped by their own norm or that of Euclidean ones.
"""

from spinlab.learn.check import check_learning
from spinlab.learn.divergence import Divergence
from spinlab.learn.duration import announce
from spinlab.learn.estimate import estimate_of
from spinlab.learn.loop import RotationLearner, learn_rotations, resume, save_progress
from spinlab.learn.optim import unread_by_optimizer
from spinlab.learn.placement import choose_checkpoint, choose_shards, recompute_layers
from spinlab.learn.recipe import announce_further, training_of, warn_of_mismatch
from spinlab.learn.shards import Learnable, in_shards, is_sharded
from spinlab.learn.spaces import LearningSpace

__all__ = [
    "Divergence",
    "Learnable",
    "LearningSpace",
    "RotationLearner",
    "announce",
    "announce_further",
    "check_learning",
    "choose_checkpoint",
    "choose_shards",
    "estimate_of",
    "in_shards",
    "is_sharded",
    "learn_rotations",
    "recompute_layers",
    "resume",
    "save_progress",
    "training_of",
    "unread_by_optimizer",
    "warn_of_mismatch",
]
