"""What rounds the weights of a whole model, by the name in `weights.method`.

A method is one module here and one line in METHODS; what can be set has a dataclass under the same
name in `spinlab.config.weights`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from spinlab.config import WeightsConfig
from spinlab.config.checks import choice
from spinlab.weights.base import Rounding, Weights
from spinlab.weights.layerwise import (
    quantize_gptaq,
    quantize_gptq,
    quantize_qronos,
    quantize_rtn,
)
from spinlab.weights.lwc import quantize_lwc


@dataclass(frozen=True)
class Method:
    """Round a fused model; the weights come back by linear.

    together: all processes work on it; reads_inputs: formats of inputs matter to it; reads_kv:
    those of keys, values and queries do.
    """

    work: Callable[[Rounding], Weights]
    together: bool = False
    reads_inputs: bool = False
    reads_kv: bool = False


def _rtn(rounding: Rounding) -> Weights:
    settings = rounding.quant, rounding.config.clip, rounding.rotations.weight_clips
    found = rounding.store()
    for piece in rounding.pieces():
        found.update(quantize_rtn(piece, *settings))
    return found


METHODS = {
    "rtn": Method(_rtn),
    "gptq": Method(quantize_gptq, together=True),
    "gptaq": Method(quantize_gptaq, together=True, reads_inputs=True, reads_kv=True),
    "qronos": Method(quantize_qronos, together=True, reads_inputs=True, reads_kv=True),
    "lwc": Method(quantize_lwc, reads_inputs=True),
}


def check_method(config: WeightsConfig) -> None:
    """Raise InputError for a method that is not in the table."""
    choice("weights.method", config.method, tuple(METHODS))
