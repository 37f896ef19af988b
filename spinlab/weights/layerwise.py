"""Quantize all rotated linears of a fused model: RTN at once, others layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import ClipSearch, QuantConfig, WeightsConfig
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
from spinlab.kv.cache import attach_kv, kv_path_of, set_kv_path
from spinlab.kv.path import KVPath
from spinlab.model.map import ModelMap
from spinlab.model.modules import linear_at, map_of
from spinlab.tensors import kept_tensors, save_tensors
from spinlab.weights.base import Rounding, Weights
from spinlab.weights.calibration import LayerInputs, batch_of
from spinlab.weights.ends import quantize_ends
from spinlab.weights.gptq import ErrorSpread, Moment, error_spread, gptq
from spinlab.weights.mismatch import Mismatch, gptaq, mismatch, qronos
from spinlab.weights.pairs import PairedInputs
from spinlab.weights.quantized import (
    QuantizedWeight,
    from_stored_form,
    set_dequantized,
    stored_form,
)
from spinlab.weights.rtn import round_to_nearest, rtn
from spinlab.weights.stacks import Factors, Stacks, Sweeping, round_stacks, round_unseen
from spinlab.weights.unseen import warn_of_unseen

_CURE = "give it others, or another format, by quant.overrides"  # for groups that do not tile it


def check_weight_groups(model_map: ModelMap, quant: QuantConfig) -> None:
    """Raise InputError where formats do not fit the model.

    That is where there is no such format, weight groups do not tile an input, or not nest with the
    input's groups, and where a pattern of `quant.overrides` names nothing.
    """
    check_patterns(model_map, quant)
    for site, format in rounded_sites(model_map, quant):
        setting = quant.place_of("weights", site.path)
        format_of(format, setting)
        width, size = site.in_features, format.group_size
        check_group(f"{setting}.group_size", size, width, f"{site.path}: {_CURE}")
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
    sites, is_part = list(rounded_sites(map_of(model), quant)), map_of(model).only is not None
    for site, format in tqdm(sites, desc="rtn", disable=is_part):
        weight = linear_at(model, site.path).weight.detach().float()
        if site.path in learned:
            ratios = learned[site.path].to(weight.device)
            found[site.path] = round_to_nearest(weight, format, ratios).cpu()
        else:
            found[site.path] = rtn(weight, format, clip).cpu()
    return found | quantize_ends(model, quant, clip)


def quantize_gptq(rounding: Rounding) -> Weights:
    """Return every weight of fewer than 16 bits, rounded by GPTQ; the model is overwritten.

    Activations stay unquantized while Hessians are gathered. A linear sees inputs from already
    quantized layers and, within its layer, from the already quantized readers of earlier inputs.
    """
    rounding.change(partial(insert_fake_quant, rotations=rounding.rotations, config=None))
    found = quantize_ends(rounding.model, rounding.quant, rounding.config.clip)
    inputs = _windows_in(rounding)

    def spread(linear: FakeQuantLinear) -> ErrorSpread:
        return error_spread(gather(inputs, linear), rounding.config.gptq)

    return _layer_by_layer(rounding, inputs, spread, gptq, found)


def quantize_gptaq(rounding: Rounding) -> Weights:
    """Do what `_quantize_paired` does, by GPTAQ."""
    return _quantize_paired(rounding, gptaq)


def quantize_qronos(rounding: Rounding) -> Weights:
    """Do what `_quantize_paired` does, by Qronos."""
    return _quantize_paired(rounding, qronos)


def _quantize_paired(rounding: Rounding, sweep: Sweeping[Mismatch]) -> Weights:
    """Return every weight of fewer than 16 bits, rounded towards the original's outputs.

    The model is overwritten. The network that a linear is rounded for has its inputs, keys, values
    and queries rounded from the start, as both papers have it, and weights as GPTQ meets them. The
    original is the model as it is given: a tied matrix (`quant.tied`) is rounded in both, embedding
    and head of their own in the quantized network alone.
    """
    model = rounding.model
    rounding.change(partial(insert_fake_quant, rotations=rounding.rotations, config=rounding.quant))
    path = KVPath(rounding.kv.r3, apart=rounding.kv.apart)
    rounding.change(partial(attach_kv, path=path, store=False))
    exact = kv_path_of(model)
    exact = replace(exact, biases=rounding.biases_apart() or exact.biases)
    set_kv_path(model, exact)
    coded = replace(rounding.kv, biases=exact.biases)
    original = _windows_in(rounding)
    found = quantize_ends(model, rounding.quant, rounding.config.clip)
    rounding.change(partial(set_kv_path, path=coded))
    pairs = PairedInputs(model, original, _windows_in(rounding), exact, coded)

    def lack(linear: FakeQuantLinear) -> Mismatch:
        return mismatch(*gather_pairs(pairs, linear), rounding.config.own)

    return _layer_by_layer(rounding, pairs, lack, sweep, found)


def _layer_by_layer(
    rounding: Rounding,
    inputs: LayerInputs | PairedInputs,
    factors: Callable[[FakeQuantLinear], Factors],
    sweep: Sweeping[Factors],
    ends: Weights,
) -> Weights:
    """Round the linears of all layers, in the order of computation; return them behind the ends.

    factors: what `sweep` is to know of a linear's inputs. Finished layers are kept in `progress`; a
    later call takes them from there and continues with the same bits. Embedding and head are
    rounded to nearest. Of several processes each takes its part of the windows and adds to common
    moments; all end with the weights of the first, which alone writes.
    """
    found = rounding.store()
    found.update(ends)
    make = partial(_quantize_layer, rounding, inputs, factors, sweep)
    for index in tqdm(range(len(map_of(rounding.model).layers)), desc=rounding.config.method):
        with rounding.layer(index):
            inputs.begin()
            found.update(kept_layer(rounding, index, make))
            inputs.advance()
    return found


def _windows_in(rounding: Rounding) -> LayerInputs:
    """Take this process's part of the windows to the first layer."""
    assert rounding.windows is not None
    check_samples(len(rounding.windows), rounding.config)
    mine = parallel.part(rounding.windows)
    return LayerInputs(rounding.model, mine, batch_of(rounding.model.device, mine.shape[1]))


def check_samples(samples: int, config: WeightsConfig) -> None:
    """Raise InputError where there are fewer calibration windows than processes."""
    if samples < parallel.world():
        raise InputError(
            f"weights.{config.method}.samples={samples} leaves some of {parallel.world()} "
            "processes without a window: raise it, or start fewer"
        )


def kept_layer(
    rounding: Rounding, index: int, make: Callable[[], dict[str, QuantizedWeight]]
) -> dict[str, QuantizedWeight]:
    """Return the weights of a layer; afterwards the model holds them.

    They are in the host's memory, or where they were made if the store packs them: it does so
    there, and the host never has the levels of a layer unpacked.

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
    if rounding.part is not None:
        return weights
    return {name: weight.cpu() for name, weight in weights.items()}


def _quantize_layer(
    rounding: Rounding,
    inputs: LayerInputs | PairedInputs,
    factors: Callable[[FakeQuantLinear], Factors],
    sweep: Sweeping[Factors],
) -> dict[str, QuantizedWeight]:
    """Quantize the current decoder layer, input after input in the order of computation.

    Weights of one input and format are rounded in one sweep, but for formats with a scale of the
    whole tensor: there each weight has its own, as it has in rounding to nearest. Each expert is
    rounded for its own tokens, and to nearest if it has none.
    """
    model = rounding.model
    readers: dict[tuple, Stacks] = {}
    for site, format in rounded_sites(map_of(model), rounding.quant):
        if site.layer == inputs.index:
            alike = format, site.path if format_of(format).of_tensor else ""
            readers.setdefault(site.rows, {}).setdefault(alike, []).append(site.path)
    found: dict[str, QuantizedWeight] = {}
    unseen: list[str] = []
    for stacks in readers.values():
        names = [name for stack in stacks.values() for name in stack]
        if (rounded := round_stacks(rounding, stacks, factors, sweep)) is None:
            unseen += names
            rounded = round_unseen(rounding, stacks)
        found |= rounded
        for name in names:
            set_dequantized(linear_at(model, name), found[name])
    warn_of_unseen(rounding, inputs.index, unseen)
    return found


def gather(inputs: LayerInputs, linear: FakeQuantLinear) -> torch.Tensor:
    """Return the Hessian of a linear's transformed inputs in the current layer."""
    hessian = _moment(linear)

    def see(x: torch.Tensor) -> None:
        x = linear.path(x)
        hessian.add(x, x)

    inputs.visit(linear, see)
    return hessian.value()


def gather_pairs(pairs: PairedInputs, linear: FakeQuantLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H of a linear's inputs in the current layer, and D, as `mismatch` takes them."""
    hessian, cross = _moment(linear), _moment(linear)

    def see(exact: torch.Tensor, x: torch.Tensor) -> None:
        hessian.add(x, x)
        cross.add(exact.float() - x.float(), x)

    pairs.visit(linear, see)
    return hessian.value(), cross.value()


def _moment(linear: torch.nn.Linear) -> Moment:
    return Moment(linear.weight.shape[1], linear.weight.device)
