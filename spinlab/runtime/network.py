"""The hand-off: a rotated stock model becomes one whose linears and KV cache hold integers."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig
from spinlab.kv.cache import attach_kv, kv_path
from spinlab.model.seams import family_of, layers_of, linear_at
from spinlab.quant.inputs import InputPath
from spinlab.quant.network import FakeQuantLinear, input_paths
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.kernels import KERNELS
from spinlab.runtime.linear import IntegerLinear
from spinlab.weights.quantized import QuantizedWeight


def insert_integer_linears(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    rotations: RotationSet,
    quant: QuantConfig,
    backend: str,
) -> None:
    """Swap every rotated linear for its integer twin, in place.

    With 16-bit activations there are no integers to multiply: such linears hold the dequantized
    weight instead.
    """
    family = family_of(model.config)
    paths = input_paths(model, rotations.r4, quant)
    for index, layer in enumerate(layers_of(model)):
        for seam in family.seams:
            linear = linear_at(layer, seam.name)
            weight = weights[f"{family.layers}.{index}.{seam.name}"]
            path = paths[index][seam.group]
            layer.set_submodule(seam.name, _linear(linear, weight, path, backend))


def _linear(linear: nn.Linear, weight: QuantizedWeight, path: InputPath, backend: str) -> nn.Module:
    dtype = linear.weight.dtype
    if path.quantizer is None or path.quantizer.grid.bits > 8:
        linear.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        return FakeQuantLinear(linear, path)
    return IntegerLinear(weight, linear.bias, path, KERNELS[backend], dtype)


def integer_model(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
    rotations: RotationSet,
    quant: QuantConfig,
    kv: KVConfig,
    backend: str,
) -> PreTrainedModel:
    """Make a fused model run on integers, in place: linears, online rotations and KV cache.

    `model.generate()` and teacher-forced passes both store their keys and values coded.
    """
    insert_integer_linears(model, weights, rotations, quant, backend)
    attach_kv(model, kv_path(model, rotations.r3, kv), store=True)
    return model


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
