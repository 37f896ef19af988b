"""The hand-off: the linears of a rotated stock model become linears that hold integers."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from spinlab.config import QuantConfig
from spinlab.model.seams import family_of, layers_of, linear_at, linears_of
from spinlab.quant.inputs import InputPath
from spinlab.quant.network import FakeQuantLinear, input_paths
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.kernels import KERNELS
from spinlab.runtime.linear import IntegerLinear
from spinlab.weights.quantized import QuantizedWeight, set_dequantized


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
    paths = input_paths(model, rotations, quant)
    for name, index, seam, linear in list(linears_of(model)):
        twin = _linear(linear, weights.get(name), paths[index][seam.group], backend)
        layers_of(model)[index].set_submodule(seam.name, twin)
    write_ends(model, weights)


def write_ends(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write head and embedding, where they are quantized, as the floats they stand for.

    Their inputs are 16-bit or indices, so there are no integers to multiply.
    """
    family = family_of(model.config.model_type)
    for name in (family.embedding, family.head):
        if name in weights:
            set_dequantized(linear_at(model, name), weights[name])


def _linear(
    linear: nn.Linear, weight: QuantizedWeight | None, path: InputPath, backend: str
) -> nn.Module:
    dtype, device = linear.weight.dtype, linear.weight.device
    if weight is None:
        return FakeQuantLinear(linear, path)
    if path.quantizer is None or max(path.quantizer.grid.bits, weight.grid.bits) > 8:
        set_dequantized(linear, weight)
        return FakeQuantLinear(linear, path)
    integer = IntegerLinear(weight, linear.bias, path, KERNELS[backend], dtype)
    return integer.to(device)
