"""Quantize all rotated linears of a fused model: RTN at once, GPTQ layer by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.config import QuantConfig, WeightsConfig
from spinlab.errors import InputError
from spinlab.model.seams import Family, family_of, layers_of, linear_at, linears_of
from spinlab.quant.inputs import check_group
from spinlab.quant.network import FakeQuantLinear, insert_fake_quant, token_quantizer
from spinlab.rotation.online import OnlineRotation
from spinlab.weights.gptq import Hessian, gptq
from spinlab.weights.quantized import QuantizedWeight, load_weights, save_weights
from spinlab.weights.rtn import round_to_nearest, rtn


def check_weight_groups(model: PreTrainedModel, quant: QuantConfig) -> None:
    """Raise InputError where weight groups do not tile an input, or not nest with the input's."""
    for name, _, seam, linear in linears_of(model):
        width, size = linear.weight.shape[1], quant.weights.group_size
        check_group("quant.weights.group_size", size, width, name)
        quantizer = token_quantizer(model, seam, quant)
        of_input = (quantizer.group_size if quantizer else 0) or width
        fine, coarse = sorted((size or width, of_input))
        if coarse % fine:
            raise InputError(
                f"quant.weights.group_size={size} and groups of {of_input} inputs of {name} do "
                "not nest: one must divide the other"
            )


def quantize_rtn(
    model: PreTrainedModel,
    quant: QuantConfig,
    config: WeightsConfig,
    clips: Mapping[str, torch.Tensor],
) -> dict[str, QuantizedWeight]:
    """Return every rotated linear's weight rounded to nearest.

    clips: learned clip ratios by name; a weight without one gets its clip search.
    """
    found: dict[str, QuantizedWeight] = {}
    for name, _, _, linear in tqdm(list(linears_of(model)), desc="rtn"):
        weight = linear.weight.detach().float()
        if name in clips:
            found[name] = round_to_nearest(weight, quant.weights, clips[name].to(weight.device))
        else:
            found[name] = rtn(weight, quant.weights, config)
    return found


def quantize_gptq(
    model: PreTrainedModel,
    r4: OnlineRotation | None,
    windows: torch.Tensor,
    quant: QuantConfig,
    config: WeightsConfig,
    progress: Path,
) -> dict[str, QuantizedWeight]:
    """Return every rotated linear's weight rounded by GPTQ; the model is used up.

    windows: (samples, length) token ids. Activations stay unquantized while Hessians are
    gathered. A linear sees inputs from already quantized layers and, within its layer, from
    already quantized groups. Finished layers are kept in `progress`; a later call takes them from
    there and continues with the same bits.
    """
    insert_fake_quant(model, r4, None)
    inputs, kwargs = first_layer_inputs(model, windows)
    family = family_of(model.config.model_type)
    found: dict[str, QuantizedWeight] = {}
    for index, layer in enumerate(tqdm(layers_of(model), desc="gptq")):
        path = progress / f"layer-{index:03d}.safetensors"
        if path.exists():
            weights = load_weights(path)
            for name, weight in weights.items():
                _set_weight(linear_at(layer, name), weight)
        else:
            weights = _quantize_layer(layer, family, inputs, kwargs, quant, config)
            temporary = path.with_suffix(".tmp")
            save_weights(weights, temporary)
            temporary.replace(path)
        found |= {f"{family.layers}.{index}.{name}": w for name, w in weights.items()}
        inputs = [_run(layer, x, kwargs) for x in inputs]
    return found


def _quantize_layer(
    layer: nn.Module,
    family: Family,
    inputs: list[torch.Tensor],
    kwargs: dict[str, Any],
    quant: QuantConfig,
    config: WeightsConfig,
) -> dict[str, QuantizedWeight]:
    """Quantize one decoder layer, group after group in the order of computation."""
    weights: dict[str, QuantizedWeight] = {}
    for group in dict.fromkeys(seam.group for seam in family.seams):
        names = [seam.name for seam in family.seams if seam.group == group]
        hessian = _gather(layer, linear_at(layer, names[0]), inputs, kwargs)
        for name in names:
            linear = linear_at(layer, name)
            weights[name] = gptq(linear.weight, hessian, quant.weights, config)
            _set_weight(linear, weights[name])
    return weights


def _gather(
    layer: nn.Module, linear: nn.Linear, inputs: list[torch.Tensor], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the Hessian of a linear's (online-rotated) inputs over all windows."""
    hessian = Hessian(linear.weight.shape[1], linear.weight.device)

    def add(module: nn.Module, args: tuple) -> None:
        hessian.add(cast(FakeQuantLinear, module).path(args[0]))

    hook = linear.register_forward_pre_hook(add)
    for x in inputs:
        _run(layer, x, kwargs)
    hook.remove()
    return hessian.value()


def _set_weight(linear: nn.Linear, weight: QuantizedWeight) -> None:
    dense = weight.dequantize(linear.weight.dtype).to(linear.weight.device)
    linear.weight = nn.Parameter(dense, requires_grad=False)


class _Stop(Exception):
    """Leave a forward pass once the first layer's input is known."""


@torch.no_grad()
def first_layer_inputs(
    model: PreTrainedModel, windows: torch.Tensor
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return the first decoder layer's input per window, and its other arguments."""
    inputs: list[torch.Tensor] = []
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0])
        kept.update(kwargs)
        raise _Stop

    hook = layers_of(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    for window in windows:
        try:
            model(input_ids=window[None].to(model.device), use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return inputs, kept


@torch.no_grad()
def _run(layer: nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    out = layer(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out
