"""Quantize all rotated linears of a fused model: RTN at once, GPTQ layer by layer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import ClipSearch, QuantConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.fakequant.insert import (
    FakeQuantLinear,
    check_patterns,
    insert_fake_quant,
    rounded_sites,
    token_quantizer,
)
from spinlab.formats import format_of
from spinlab.formats.quantizer import check_group
from spinlab.model.map import ModelMap
from spinlab.model.modules import linear_at, map_of
from spinlab.tensors import kept_tensors, save_tensors
from spinlab.weights.base import Rounding
from spinlab.weights.calibration import LayerInputs, batch_of
from spinlab.weights.ends import quantize_ends
from spinlab.weights.gptq import Hessian, error_spread, gptq
from spinlab.weights.quantized import (
    QuantizedWeight,
    from_stored_form,
    set_dequantized,
    stored_form,
)
from spinlab.weights.rtn import round_to_nearest, rtn


def check_weight_groups(model_map: ModelMap, quant: QuantConfig) -> None:
    """Raise InputError where formats do not fit the model.

    That is where there is no such format, weight groups do not tile an input, or not nest with the
    input's groups, and where a pattern of `quant.overrides` names nothing.
    """
    check_patterns(model_map, quant)
    for site, format in rounded_sites(model_map, quant):
        format_of(format)
        setting = "quant.weights" if format is quant.weights else "quant.overrides: weights"
        width, size = site.in_features, format.group_size
        check_group(f"{setting}.group_size", size, width, site.path)
        quantizer = token_quantizer(model_map, site, quant)
        of_input = (quantizer.group_size if quantizer else 0) or width
        fine, coarse = sorted((size or width, of_input))
        if coarse % fine:
            raise InputError(
                f"{setting}.group_size={size} and groups of {of_input} inputs of {site.path} do "
                "not nest: one must divide the other"
            )


def quantize_rtn(
    model: PreTrainedModel,
    quant: QuantConfig,
    clip: ClipSearch,
    learned: Mapping[str, torch.Tensor],
) -> dict[str, QuantizedWeight]:
    """Return every weight that has a format of fewer than 16 bits, rounded to nearest.

    learned: clip ratios (out, in/g, 1) by name; a weight without one gets its clip search.
    """
    found: dict[str, QuantizedWeight] = {}
    for site, format in tqdm(list(rounded_sites(map_of(model), quant)), desc="rtn"):
        weight = linear_at(model, site.path).weight.detach().float()
        if site.path in learned:
            ratios = learned[site.path].to(weight.device)
            found[site.path] = round_to_nearest(weight, format, ratios).cpu()
        else:
            found[site.path] = rtn(weight, format, clip).cpu()
    return found | quantize_ends(model, quant, clip)


def quantize_gptq(rounding: Rounding) -> dict[str, QuantizedWeight]:
    """Return every weight of fewer than 16 bits, rounded by GPTQ; the model is overwritten.

    Activations stay unquantized while Hessians are gathered. A linear sees inputs from already
    quantized layers and, within its layer, from the already quantized readers of earlier inputs.
    Finished layers are kept in `progress`; a later call takes them from there and continues with
    the same bits. Embedding and head are rounded to nearest.

    Of several processes each takes its part of the windows and adds to common Hessians; all end
    with the weights of the first, which alone writes.
    """
    assert rounding.windows is not None
    check_samples(len(rounding.windows))
    insert_fake_quant(rounding.model, rounding.rotations, None)
    found = quantize_ends(rounding.model, rounding.quant, rounding.config.clip)
    mine = parallel.part(rounding.windows)
    inputs = LayerInputs(rounding.model, mine, batch_of(rounding.model.device, mine.shape[1]))
    for index in tqdm(range(len(inputs.layers)), desc="gptq"):
        found |= kept_layer(rounding, index, partial(_quantize_layer, rounding, inputs))
        inputs.advance()
    return found


def check_samples(samples: int) -> None:
    """Raise InputError where there are fewer calibration windows than processes."""
    if samples < parallel.world():
        raise InputError(
            f"weights.gptq.samples={samples} leaves some of {parallel.world()} processes without a "
            "window: raise it, or start fewer"
        )


def kept_layer(
    rounding: Rounding, index: int, make: Callable[[], dict[str, QuantizedWeight]]
) -> dict[str, QuantizedWeight]:
    """Return the weights of a layer, in the host's memory; afterwards the model holds them.

    They are those that an earlier call left in `progress`, if they are sound, or what `make`
    returns.
    """
    path = rounding.progress / f"layer-{index:03d}.safetensors"
    kept = kept_tensors(path)
    weights = make() if kept is None else from_stored_form(*kept)
    for name, weight in weights.items():
        set_dequantized(linear_at(rounding.model, name), weight)
    if kept is None and parallel.is_main():
        save_tensors(path, *stored_form(weights))
    return {name: weight.cpu() for name, weight in weights.items()}


def _quantize_layer(rounding: Rounding, inputs: LayerInputs) -> dict[str, QuantizedWeight]:
    """Quantize the current decoder layer, input after input in the order of computation."""
    model = rounding.model
    readers: dict[str, dict[TensorQuant, list[str]]] = {}
    for site, format in rounded_sites(map_of(model), rounding.quant):
        if site.layer == inputs.index:
            readers.setdefault(site.key, {}).setdefault(format, []).append(site.path)
    found: dict[str, QuantizedWeight] = {}
    for formats in readers.values():
        (first, *_), *_ = formats.values()
        spread = error_spread(gather(inputs, linear_at(model, first)), rounding.config.gptq)
        for format, stack in formats.items():
            weights = [linear_at(model, name).weight for name in stack]
            whole = gptq(torch.cat(weights), spread, format, rounding.config)
            parallel.share_tensors([whole.levels, whole.scale, whole.zero])
            rows = [weight.shape[0] for weight in weights]
            found |= zip(stack, whole.split(rows), strict=True)
        for name in (name for stack in formats.values() for name in stack):
            set_dequantized(linear_at(model, name), found[name])
    return found


def gather(inputs: LayerInputs, linear: torch.nn.Linear) -> torch.Tensor:
    """Return the Hessian of a linear's transformed inputs in the current layer."""
    hessian = Hessian(linear.weight.shape[1], linear.weight.device)
    path = cast(FakeQuantLinear, linear).path
    inputs.visit(linear, lambda x: hessian.add(path(x)))
    return hessian.value()
