"""Which space a run learns in."""

from spinlab.config import LearnConfig, QuantConfig
from spinlab.learn.spaces.activations import ActivationSpace
from spinlab.learn.spaces.base import LearningSpace
from spinlab.learn.spaces.weights import WeightSpace


def rounds_weights(learn: LearnConfig, quant: QuantConfig) -> bool:
    """Tell whether any weight is rounded in the loop."""
    return learn.quantize_weights and any(format.quantizes for format in quant.weight_formats)


def space_of(learn: LearnConfig, quant: QuantConfig) -> type[LearningSpace]:
    """Return the space of weights where any is rounded in the loop, else that of activations."""
    return WeightSpace if rounds_weights(learn, quant) else ActivationSpace
