"""The fake-quantized network: stock modules, each rotated linear behind its InputPath."""

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.config import QuantConfig
from spinlab.errors import InputError
from spinlab.fakequant.activations import InputPath
from spinlab.formats import format_of
from spinlab.formats.quantizer import TokenQuantizer, check_group
from spinlab.model.seams import (
    Seam,
    dimensions_of,
    family_of,
    layers_of,
    linear_at,
    linears_of,
)
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import input_key


class FakeQuantLinear(nn.Linear):
    """A linear whose input goes through a rotation and a round trip on the integer grid."""

    def __init__(self, linear: nn.Linear, path: InputPath) -> None:
        nn.Module.__init__(self)  # takes the linear's parameters over instead of making its own
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.path(x), self.weight, self.bias)


def input_paths(
    model: PreTrainedModel, rotations: RotationSet, config: QuantConfig | None
) -> list[dict[str, InputPath]]:
    """Make one InputPath per layer and group of readers. Without `config` nothing is rounded.

    Clip ratios that were learned go before those of the settings.
    """
    if config is not None:
        check_patterns(model, config)
    paths: list[dict[str, InputPath]] = [{} for _ in layers_of(model)]
    readers = Counter(seam.group for seam in family_of(model.config.model_type).seams)
    for name, layer, seam, _ in linears_of(model):
        quantizer = token_quantizer(model, name, seam, config)
        if quantizer is not None and (key := input_key(layer, seam.group)) in rotations.clips:
            quantizer = replace(quantizer, clip_ratio=rotations.clips[key])
        first = paths[layer].get(seam.group)
        if first is None:
            online = rotations.online(layer, seam)
            paths[layer][seam.group] = InputPath(online, quantizer, readers[seam.group])
        elif first.quantizer != quantizer:
            raise InputError(
                f"{name} shares its input with other linears: quant.overrides must give all of "
                "them the same activations"
            )
    return paths


def check_patterns(model: PreTrainedModel, quant: QuantConfig) -> None:
    """Raise InputError where a pattern of `quant.overrides` matches no linear."""
    names = [name for name, *_ in linears_of(model)]
    for pattern in (override["pattern"] for override in quant.overrides):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"quant.overrides: the pattern {pattern!r} matches no linear of the model: their "
                f"names are like {names[0]}"
            )


def token_quantizer(
    model: PreTrainedModel, name: str, seam: Seam, config: QuantConfig | None
) -> TokenQuantizer | None:
    """Return the quantizer of a named linear's input; None where inputs stay 16-bit.

    o_proj reads the heads' outputs and may have one scale per head. Raises InputError where the
    group size does not divide the width.
    """
    if config is None or not (tensor := config.activations_at(name)).quantizes:
        return None
    dimensions, group = dimensions_of(model.config), tensor.group_size
    width = input_width(model, seam)
    if seam.reads == "R2" and config.o_proj_per_head:
        group = min(group or dimensions.head_dim, dimensions.head_dim)
    check_group("quant.activations.group_size", group, width, seam.name)
    return TokenQuantizer(format_of(tensor), group, tensor.clip_ratio)


def input_width(model: PreTrainedModel, seam: Seam) -> int:
    """Return the input width of a seam's linear."""
    return linear_at(layers_of(model)[0], seam.name).weight.shape[1]


def insert_fake_quant(
    model: PreTrainedModel, rotations: RotationSet, config: QuantConfig | None
) -> None:
    """Swap every rotated linear for one behind its InputPath, in place."""
    paths = input_paths(model, rotations, config)
    for _, index, seam, linear in list(linears_of(model)):
        layer = layers_of(model)[index]
        layer.set_submodule(seam.name, FakeQuantLinear(linear, paths[index][seam.group]))
