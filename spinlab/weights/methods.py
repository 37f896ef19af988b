"""What rounds the weights of a whole model, by the name in `weights.method`.

A method is one module here and one line in METHODS; what can be set has a dataclass under the same
name in `spinlab.config.weights`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab.config import QuantConfig, WeightsConfig
from spinlab.config.checks import choice
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.layerwise import quantize_gptq, quantize_rtn
from spinlab.weights.lwc import quantize_lwc
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Method:
    """Round a fused model with `work(model, rotations, windows, quant, config, progress)`.

    windows: (samples, length) token ids, where the method's settings ask for them, else None. What
    is left in the folder `progress` is there when a killed run continues. The weights come back by
    linear. together: all processes work on it; reads_inputs: formats of inputs matter to it.
    """

    work: Callable[..., dict[str, QuantizedWeight]]
    together: bool = False
    reads_inputs: bool = False


def _rtn(
    model: PreTrainedModel,
    rotations: RotationSet,
    windows: torch.Tensor | None,
    quant: QuantConfig,
    config: WeightsConfig,
    progress: Path,
) -> dict[str, QuantizedWeight]:
    return quantize_rtn(model, quant, config.clip, rotations.weight_clips)


METHODS = {
    "rtn": Method(_rtn),
    "gptq": Method(quantize_gptq, together=True),
    "lwc": Method(quantize_lwc, reads_inputs=True),
}


def check_method(config: WeightsConfig) -> None:
    """Raise InputError for a method that is not in the table."""
    choice("weights.method", config.method, tuple(METHODS))
