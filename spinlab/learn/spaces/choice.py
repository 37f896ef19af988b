"""Which space a run learns in."""

from spinlab.config import LearnConfig, QuantConfig
from spinlab.learn.spaces.activations import ActivationSpace
from spinlab.learn.spaces.base import LearningSpace
from spinlab.learn.spaces.weights import WeightSpace


def space_of(learn: LearnConfig, quant: QuantConfig) -> type[LearningSpace]:
    """Return the space of weights where any is rounded in the loop, else that of activations."""
    return WeightSpace if learn.rounds(quant) else ActivationSpace
