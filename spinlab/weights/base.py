"""What a method that rounds weights is given."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab.config import QuantConfig, WeightsConfig
from spinlab.kv.path import KVPath
from spinlab.rotation.rotations import RotationSet


@dataclass(frozen=True)
class Rounding:
    """Name a fused model whose weights are to be rounded, and how.

    Weights of the model may be overwritten. rotations: what it was fused with, of which some stay
    online. windows: (samples, length) token ids, where the method's settings ask for them, else
    None. What is left in the folder `progress` is there when a killed run continues. kv: what keys,
    values and queries will go through.
    """

    model: PreTrainedModel
    rotations: RotationSet
    windows: torch.Tensor | None
    quant: QuantConfig
    config: WeightsConfig
    progress: Path
    kv: KVPath = field(default_factory=KVPath)
