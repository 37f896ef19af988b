"""Stage `outliers`: the largest inputs of the attention, before and after rotating."""

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
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import gate_ids, networks_of, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.tensors import write_tensors

_FILE = "peaks.safetensors"


def outliers(
    run: Run,
    original: Original,
    calibration: Calibration,
    rotated: dict[str, Artifact],
    transformed: bool,
) -> dict[str, torch.Tensor]:
    """Return per network the largest |attention input| of each layer and channel, as a stage.

    rotated: the rotations of each network by name; transformed: the model brings some fused, and
    shows nothing of what was before.
    """

    def work(out: Path) -> None:
        networks, ids = networks_of(run, original), gate_ids(original, calibration)
        sets = {} if transformed else {"before": RotationSet()}
        sets |= {name: rotations_in(run, made) for name, made in rotated.items()}
        peaks = {name: channel_peaks(networks.rotated(found), ids) for name, found in sets.items()}
        check_finite(peaks, "attention inputs on the way to the outlier figure")
        write_tensors(out / _FILE, peaks)

    keys = {name: made.key for name, made in rotated.items()}
    depends = [original.identity, calibration.key, keys]
    return load_file(run.cache.run("outliers", depends, work).path / _FILE)


@torch.no_grad()
def channel_peaks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the largest |input| per layer and channel of the attention: (layers, hidden).

    ids: (1, tokens). Linears that share their input are read once, at the first of them, behind
    what runs online.
    """
    peaks: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        x = module.path(args[0]) if isinstance(module, FakeQuantLinear) else args[0]
        peaks.append(x.detach().abs().flatten(0, -2).amax(0).float().cpu())

    with temporary_hooks() as hooks:
        for layer in map_of(model).layers:
            linear = model.get_submodule(layer.attention.queries)
            hooks.append(linear.register_forward_pre_hook(keep))
        model(input_ids=ids.to(model.device), use_cache=False)
    return torch.stack(peaks)
