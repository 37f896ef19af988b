"""The hand-off: the linears of a rotated stock model become linears that hold integers."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from spinlab.config import QuantConfig
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

    Where activations or weights have more than 8 bits there are no integers to multiply: such
    linears hold the dequantized weight, or their own where none is given.
    """
    family = family_of(model.config.model_type)
    paths = input_paths(model, rotations.r4, quant)
    for index, layer in enumerate(layers_of(model)):
        for seam in family.seams:
            linear = linear_at(layer, seam.name)
            weight = weights.get(f"{family.layers}.{index}.{seam.name}")
            path = paths[index][seam.group]
            layer.set_submodule(seam.name, _linear(linear, weight, path, backend))


def _linear(
    linear: nn.Linear, weight: QuantizedWeight | None, path: InputPath, backend: str
) -> nn.Module:
    dtype, device = linear.weight.dtype, linear.weight.device
    if weight is None:
        return FakeQuantLinear(linear, path)
    if path.quantizer is None or max(path.quantizer.grid.bits, weight.grid.bits) > 8:
        linear.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
        return FakeQuantLinear(linear, path)
    integer = IntegerLinear(weight, linear.bias, path, KERNELS[backend], dtype)
    return integer.to(device)
