"""What the network under learning computes: 16-bit weights, rounded ones, and the definition."""

from spinlab.learn.spaces.activations import ActivationSpace
from spinlab.learn.spaces.base import CHUNK, LearningSpace, Parts
from spinlab.learn.spaces.choice import space_of
from spinlab.learn.spaces.definition import PlainSpace
from spinlab.learn.spaces.local import LocalTerms
from spinlab.learn.spaces.weights import WeightSpace

__all__ = [
    "CHUNK",
    "ActivationSpace",
    "LearningSpace",
    "LocalTerms",
    "Parts",
    "PlainSpace",
    "WeightSpace",
    "space_of",
]
