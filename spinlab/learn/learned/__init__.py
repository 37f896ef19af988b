"""What is learned: rotations, transforms of inputs, and ranges."""

from spinlab.learn.learned.input_ranges import learn_input_ranges
from spinlab.learn.learned.inputs import LearnedInputs, check_inputs
from spinlab.learn.learned.kv_ranges import learn_kv_ranges
from spinlab.learn.learned.log_parameters import LogParameters, part_of
from spinlab.learn.learned.rotations import LearnedRotations, Sink

__all__ = [
    "LearnedInputs",
    "LearnedRotations",
    "LogParameters",
    "Sink",
    "check_inputs",
    "learn_input_ranges",
    "learn_kv_ranges",
    "part_of",
]
