"""The hand-off: the linears of a rotated stock model become linears that hold integers."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.fakequant.activations import IdentityCache, InputPath
from spinlab.fakequant.insert import FakeQuantLinear, input_paths
from spinlab.formats import Format
from spinlab.model.modules import linears_of, map_of
from spinlab.runtime.kernels.matmul import kernel_for
from spinlab.runtime.quantized import Quantized
from spinlab.runtime.stock.linear import IntegerLinear, LinearPart, stacked_bias
from spinlab.weights.ends import write_ends
from spinlab.weights.quantized import QuantizedWeight, set_dequantized


def insert_integer_linears(model: PreTrainedModel, parts: Quantized, backend: str) -> None:
    """Swap every rotated linear for its integer twin, in place.

    Linears of one layer that read the same input, by weights of one format, are multiplied as one,
    those of an expert apart from others.
    Where activations or weights have more than 8 bits there are no integers to multiply: such
    linears hold the dequantized weight, or their own where none is given.
    """
    weights = parts.weights
    paths = input_paths(map_of(model), parts.rotations, parts.quant)
    inputs: dict[tuple[str, int | None], dict[str, nn.Linear]] = {}
    for site, linear in linears_of(model):
        if site.quantized:
            inputs.setdefault(site.rows, {})[site.path] = linear
        elif (online := parts.rotations.for_network(site)) is not None:
            model.set_submodule(site.path, FakeQuantLinear(linear, InputPath(online, None)))
    for (key, _), linears in inputs.items():
        path, readers = InputPath(paths[key].rotation, paths[key].quantizer), 0
        for stack in _stacks(linears, weights, path):
            for name, twin in zip(
                stack, _integer(list(stack.values()), path, backend), strict=True
            ):
                model.set_submodule(name, twin)
            readers += 1
        for name in linears:
            if isinstance(linear := model.get_submodule(name), nn.Linear):
                model.set_submodule(name, _float(linear, weights.get(name), path))
                readers += 1
        path.once.readers = readers
    write_ends(model, weights, parts.quant)


def _stacks(
    linears: Mapping[str, nn.Linear], weights: Mapping[str, QuantizedWeight], path: InputPath
) -> Iterator[dict[str, tuple[nn.Linear, QuantizedWeight]]]:
    """Yield linears with integers to multiply, by the format of their weights, by name."""
    if path.quantizer is None or not path.quantizer.format.is_int8:
        return
    formats: dict[tuple[Format, int], dict[str, tuple[nn.Linear, QuantizedWeight]]] = {}
    for name, linear in linears.items():
        if name in weights and (weight := weights[name]).format.is_int8:
            formats.setdefault((weight.format, weight.groups), {})[name] = linear, weight
    yield from formats.values()


def _integer(
    stack: Sequence[tuple[nn.Linear, QuantizedWeight]], path: InputPath, backend: str
) -> list[nn.Module]:
    """Return the twins of linears that read one input by weights of one format."""
    linears, weights = zip(*stack, strict=True)
    dtype, device = linears[0].weight.dtype, linears[0].weight.device
    matmul = kernel_for(backend, weights[0].format, device)
    whole = IntegerLinear(_stacked(weights), stacked_bias(linears), path, matmul, dtype)
    whole.to(device)
    if len(stack) == 1:
        return [whole]
    once, rows = IdentityCache(len(stack)), [weight.levels.shape[0] for weight in weights]
    return [LinearPart(whole, once, rows, index) for index in range(len(stack))]


def _stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    if len(weights) == 1:
        return weights[0]
    parts = zip(*((w.levels, w.scale, w.zero) for w in weights), strict=True)
    return QuantizedWeight(*(torch.cat(part) for part in parts), format=weights[0].format)


def _float(linear: nn.Linear, weight: QuantizedWeight | None, path: InputPath) -> FakeQuantLinear:
    """Return the twin of a linear that multiplies floats."""
    if weight is not None:
        set_dequantized(linear, weight)
    return FakeQuantLinear(linear, path)
