"""What a network on integers is made of, beside the stock model that it computes in."""

from collections.abc import Mapping
from dataclasses import dataclass

from spinlab.config import QuantConfig
from spinlab.kv.path import KVPath
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Quantized:
    """Hold the parts of one quantized network.

    weights: by the path of their linear; one that is not among them keeps its own. quant: the
    formats of what linears read. kv: what keys, values and queries go through.
    """

    rotations: RotationSet
    weights: Mapping[str, QuantizedWeight]
    quant: QuantConfig
    kv: KVPath
