"""The fake-quantized network: stock modules, each rotated linear behind its InputPath."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.config import QuantConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.fakequant.activations import InputPath
from spinlab.formats import format_of
from spinlab.formats.quantizer import TokenQuantizer, check_group
from spinlab.model.map import ModelMap, Site
from spinlab.model.modules import linears_of, map_of
from spinlab.rotation.rotations import RotationSet


class FakeQuantLinear(nn.Linear):
    """A linear whose input goes through a rotation and a round trip on the integer grid.

    It multiplies in the dtype of its input, which of some routers is a wider one than the weight's.
    """

    def __init__(self, linear: nn.Linear, path: InputPath) -> None:
        nn.Module.__init__(self)  # takes the linear's parameters over instead of making its own
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.path(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def input_paths(
    model_map: ModelMap, rotations: RotationSet, config: QuantConfig | None
) -> dict[str, InputPath]:
    """Make one InputPath for every input of quantized linears, by its key.

    Without `config` nothing is rounded. Clip ratios that were learned go before those of the
    settings. Experts, each of which gets its own rows of an input, come to one path in turn.
    """
    if config is not None:
        check_patterns(model_map, config)
    paths: dict[str, InputPath] = {}
    sites = [site for site in model_map.sites if site.quantized]
    readers = Counter(site.rows for site in sites)
    for site in sites:
        quantizer = token_quantizer(model_map, site, config)
        if quantizer is not None:
            quantizer = _ranged(quantizer, site, rotations)
        first = paths.get(site.key)
        if first is None:
            paths[site.key] = InputPath(rotations.for_network(site), quantizer, readers[site.rows])
        elif first.quantizer != quantizer:
            raise InputError(
                f"{site.path} shares its input with other linears: quant.overrides must give all "
                "of them the same activations"
            )
    return paths


def _ranged(quantizer: TokenQuantizer, site: Site, rotations: RotationSet) -> TokenQuantizer:
    """Return a quantizer with what was learned or found of the range of its input."""
    if site.key in rotations.clips:
        quantizer = replace(quantizer, clip_ratio=rotations.clips[site.key])
    peak = rotations.peaks.get(site.key) if quantizer.format.calibrated else None
    return quantizer if peak is None else replace(quantizer, peak=peak)


def check_patterns(model_map: ModelMap, quant: QuantConfig) -> None:
    """Raise InputError where a pattern of `quant.overrides` matches no quantized linear.

    Of a part of a model nothing is said.
    """
    if model_map.only is not None:
        return
    names = [site.path for site in model_map.sites if site.quantized]
    for pattern in (override.pattern for override in quant.overrides):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"quant.overrides: the pattern {pattern!r} matches no linear of the model: their "
                f"names are like {names[0]}"
            )


def token_quantizer(
    model_map: ModelMap, site: Site, config: QuantConfig | None
) -> TokenQuantizer | None:
    """Return the quantizer of a linear's input; None where inputs stay 16-bit.

    What reads the heads' outputs may have one scale per head. Raises InputError where the group
    size does not divide the width.
    """
    if config is None or not (tensor := config.format_at("activations", site.path)).quantizes:
        return None
    group = tensor.group_size
    if site.reads == "R2" and config.o_proj_per_head:
        value_dim = model_map.layers[site.layer].attention.value_dim
        group = min(group or value_dim, value_dim)
    place = config.place_of("activations", site.path)
    format = format_of(tensor, place)
    check_group(f"{place}.group_size", group, site.in_features, site.name)
    return TokenQuantizer(format, group, tensor.clip_ratio)


def weight_format(site: Site, config: QuantConfig) -> TensorQuant | None:
    """Return the format of a linear's weight; None where it stays 16-bit."""
    format = config.format_at("weights", site.path)
    return format if site.quantized and format.quantizes else None


def rounded_sites(model_map: ModelMap, config: QuantConfig) -> Iterator[tuple[Site, TensorQuant]]:
    """Yield the sites whose weights are rounded, each with its format."""
    for site in model_map.sites:
        if (format := weight_format(site, config)) is not None:
            yield site, format


def insert_fake_quant(
    model: PreTrainedModel, rotations: RotationSet, config: QuantConfig | None
) -> None:
    """Swap every rotated linear for one behind its InputPath, in place.

    One that is not quantized has a path of its own, with what runs online alone.
    """
    paths = input_paths(map_of(model), rotations, config)
    for site, linear in list(linears_of(model)):
        path = paths[site.key] if site.quantized else InputPath(rotations.for_network(site), None)
        model.set_submodule(site.path, FakeQuantLinear(linear, path))
