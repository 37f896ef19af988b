"""Stage `outliers`: the largest inputs of the attention, before and after rotating."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from spinlab.cache import Artifact
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.finite import check_finite
from spinlab.model.hooks import temporary_hooks
from spinlab.model.modules import map_of
from spinlab.model.network import Network
from spinlab.rotation.rotations import AS_IT_IS
from spinlab.stages.original import Original
from spinlab.stages.rotations import gate_ids, rotated_network, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.tensors import write_tensors

_PEAKS, _INPUTS = "peaks.safetensors", "inputs.safetensors"


def outliers(
    run: Run,
    original: Original,
    calibration: Calibration,
    rotated: dict[str, Artifact],
    transformed: bool,
) -> dict[str, torch.Tensor]:
    """Return per network the largest |attention input| of each layer and channel, as a stage.

    All inputs of the layer with the worst outliers are kept beside them, for figures.
    rotated: the rotations of each network by name; transformed: the model brings some fused, and
    shows nothing of what was before.
    """

    def work(out: Path) -> None:
        ids = gate_ids(original, calibration)
        sets = {} if transformed else {"before": AS_IT_IS}
        sets |= {name: rotations_in(run, made) for name, made in rotated.items()}
        networks = {name: rotated_network(run, original, s) for name, s in sets.items()}
        peaks: dict[str, torch.Tensor] = {}
        shown: dict[str, torch.Tensor] = {}
        for name, network in networks.items():
            inputs = _inputs_of(network, ids)
            peaks[name] = channel_peaks(inputs)
            shown[name] = inputs[worst_layer(peaks)]  # that of the first network
            del inputs  # they would stand beside the next network's
        check_finite(peaks, "attention inputs on the way to the outlier figure")
        write_tensors(out / _PEAKS, peaks)
        write_tensors(out / _INPUTS, shown | {"layer": torch.tensor(worst_layer(peaks))})

    keys = {name: made.key for name, made in rotated.items()}
    depends = [original.identity, calibration.key, keys]
    return load_file(run.cache.run("outliers", depends, work).path / _PEAKS)


def _inputs_of(network: Network, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return what `attention_inputs` does, of all parts of a network."""
    return [x for part in network.parts([ids]) for x in attention_inputs(part, ids)]


def channel_peaks(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest of magnitudes (tokens, channels) per layer and channel."""
    return torch.stack([x.amax(0) for x in inputs])


def peak_ratios(peaks: torch.Tensor) -> torch.Tensor:
    """Return how far each layer's peak stands above its channels (layers, channels): peak / rms."""
    return peaks.amax(1) / peaks.square().mean(1).sqrt()


def worst_layer(peaks: Mapping[str, torch.Tensor]) -> int:
    """Return the layer whose outliers stand out most in the first of some networks."""
    return int(torch.argmax(peak_ratios(next(iter(peaks.values())))))


@torch.no_grad()
def attention_inputs(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return |input| of each layer's attention: (tokens, hidden), float32 in the host's memory.

    ids: (1, tokens). Linears that share their input are read once, at the first of them, behind
    what runs online.
    """
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        x = module.path(args[0]) if isinstance(module, FakeQuantLinear) else args[0]
        inputs.append(x.detach().abs().flatten(0, -2).float().cpu())

    with temporary_hooks() as hooks:
        for number in map_of(model).there:
            first = next(site for site in map_of(model).sites if site.layer == number)
            hooks.append(model.get_submodule(first.path).register_forward_pre_hook(keep))
        model(input_ids=ids.to(model.device), use_cache=False)
    return inputs
