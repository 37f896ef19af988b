"""Stage `weights`: the rotated weights, rounded by the method of the settings."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import PROGRESS, Artifact
from spinlab.config import QuantConfig, WeightsConfig, plain
from spinlab.errors import InputError
from spinlab.fakequant.insert import rounded_sites
from spinlab.finite import check_finite
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.model.network import Load, as_it_is
from spinlab.rotation.rotations import AS_IT_IS, RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import networks_of, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.weights.base import Rounding
from spinlab.weights.ends import quantize_tied, with_tied
from spinlab.weights.methods import METHODS
from spinlab.weights.quantized import PackedWeights, QuantizedWeight, load_weights, save_weights

_FILE = "weights.safetensors"


def round_weights(
    run: Run,
    original: Original,
    calibration: Calibration,
    rotated: Artifact | None,
    config: WeightsConfig,
) -> Artifact:
    """Round the weights of the original, or of the rotated model, as `config` says."""
    method = METHODS[config.method]
    depends = [original.identity, rotated and rotated.key, config.method, _formats(run)]
    depends += plain([config.clip, config.own])
    if config.windows:
        depends += [calibration.key, run.config.seed]
    if method.reads_inputs:
        depends.append(plain(run.config.quant))
    if method.reads_kv:
        depends.append(original.kv_settings)

    def work(out: Path) -> None:
        rotations = AS_IT_IS if rotated is None else rotations_in(run, rotated)
        windows = config.windows and calibration.windows(
            "gptq", config.windows.samples, config.windows.sequence_length
        )
        weights = _rounded(run, original, (rotations, windows), config, out / PROGRESS)
        for name, weight in weights.items():
            check_finite({name: weight.scale}, "rounded weights have no scale")
        if parallel.is_main():
            save_weights(weights, out / _FILE)

    return run.cache.run("weights", depends, work, together=method.together)


def _rounded(
    run: Run,
    original: Original,
    given: tuple[RotationSet, torch.Tensor | None],
    config: WeightsConfig,
    progress: Path,
) -> Mapping[str, QuantizedWeight]:
    """Round the weights of a model that is whole, or comes in parts, on its way to a stage's file.

    given: the rotations, and windows (samples, length) of token ids where the method reads some.
    """
    quant, (rotations, windows) = run.config.quant, given
    tied = quantize_tied(original.network(as_it_is).base, quant, config.clip)
    networks = networks_of(run, original)

    def fused(load: Load) -> PreTrainedModel:
        return replace(networks, original=with_tied(load, tied, quant)).fused(rotations)

    network = original.network(fused)
    model = network.base()
    kv = networks.kv_path(model, rotations)
    rounding = Rounding(model, rotations, windows, quant, config, progress, kv, network.part)
    weights = METHODS[config.method].work(rounding)
    if network.part is not None:
        _check_all_rounded(map_of(original.shape), quant, config.method, weights)
    weights.update(tied)
    return weights


def _check_all_rounded(
    model_map: ModelMap, quant: QuantConfig, method: str, weights: Mapping[str, QuantizedWeight]
) -> None:
    """Raise InputError where a method that was given a model in parts left some as they were."""
    due = {site.path for site, _ in rounded_sites(model_map, quant)}
    if lost := sorted(due - weights.keys()):
        raise InputError(
            f"weights.method={method} has not rounded {lost[0]} and {len(lost) - 1} more weights: "
            "with runtime.offload=true a method goes through Rounding.pieces or Rounding.layer, "
            "so use runtime.offload=false"
        )


def weights_of(run: Run, made: Artifact) -> Mapping[str, QuantizedWeight]:
    """Load what the stage has rounded, by linear: packed until asked for with offload."""
    load = PackedWeights.load if run.config.runtime.offload else load_weights
    return load(made.path / _FILE)


def _formats(run: Run) -> list[Any]:
    """Name the weight formats, for keys."""
    quant = run.config.quant
    return plain([quant.weights, quant.overrides, quant.head, quant.embedding, quant.tied])
