"""From an artefact to a model that runs on integers, weight by weight.

Packed weights go from the file to where they are multiplied: the floats that they stand for are
never there. Nothing of the folder is run, unpickled or looked up elsewhere.
"""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spinlab.artefact.weights import StoredWeights
from spinlab.device import choose_backend, choose_device
from spinlab.errors import InputError
from spinlab.export.listing import read_listing
from spinlab.export.network import REST, ROTATIONS, WEIGHTS, Network, network_from
from spinlab.kv.cache import kv_path
from spinlab.model.checkpoint import Checkpoint
from spinlab.model.load import prepared
from spinlab.model.modules import ends_of, make_rope, map_of
from spinlab.model.settings import on_meta
from spinlab.rotation.stored import read_stored
from spinlab.runtime.choice import run_on_integers
from spinlab.runtime.quantized import Quantized
from spinlab.weights.quantized import empty_weight

KIND = "artefact"  # of the export


def load(folder: str | Path, backend: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Return the quantized network of an artefact as a transformers model, in evaluation mode.

    forward() and generate() are transformers' own; keys and values are cached packed. backend and
    device are chosen as by `runtime.backend` and `runtime.device`: on the same ones logits have the
    bits of the run that wrote the artefact. Raises InputError for a folder that is not whole, was
    altered, or comes from a version that this one does not read.
    """
    place, folder = str(folder), Path(folder).expanduser()
    on = choose_device(device)
    backend = choose_backend(backend, on)
    network = network_from(place, read_listing(place, folder, KIND).get("network"))
    model = prepared(on_meta(_checkpoint(place, folder).config), getattr(torch, network.dtype))
    try:
        parts = _parts(place, folder, model, network)
        _fill(place, folder, model, cast(StoredWeights, parts.weights), on)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place} is no artefact of this version: {error!r:.200}") from error
    run_on_integers(model, parts, backend)
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def tokenizer_of(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an artefact."""
    return _checkpoint(str(folder), Path(folder).expanduser()).tokenizer()


def _checkpoint(place: str, folder: Path) -> Checkpoint:
    return Checkpoint(place, folder, {"folder": folder.resolve().name})


def _parts(place: str, folder: Path, model: PreTrainedModel, network: Network) -> Quantized:
    """Return what the model becomes a quantized network with; all of it fits the model."""
    model_map = map_of(model)
    rotations = read_stored(folder / ROTATIONS, model_map)
    weights = StoredWeights(folder / WEIGHTS)
    paths = model_map.embedding, model_map.head
    ends = zip(paths, ends_of(model), strict=True)
    weights.check(place, model_map, {path: tuple(end.weight.shape) for path, end in ends})
    kv = kv_path(network.kv, model_map.width("r3"), rotations.r3, network.seed)
    return Quantized(rotations, weights, network.quant, kv)


def _fill(
    place: str, folder: Path, model: PreTrainedModel, weights: StoredWeights, device: torch.device
) -> None:
    """Give a model on no device its numbers, but for those of weights that it is about to take."""
    own = {f"{name}.weight" for name in weights}
    due = {name: t for name, t in model.state_dict().items() if name not in own}
    with safe_open(folder / REST, framework="pt") as file:
        if wrong := sorted(due.keys() ^ set(file.keys())):
            raise InputError(f"{place}: {wrong[0]} is missing in {REST}, or has no place there")
        rest = {name: file.get_tensor(name).clone() for name in due}
    for name, tensor in rest.items():
        found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, due[name]))
        if found != wanted:
            raise InputError(f"{place}: {name} is {found}, and the model has {wanted}")
    rest = {name: tensor.to(device) for name, tensor in rest.items()}
    model.load_state_dict(rest, strict=False, assign=True)
    for name in weights:
        empty_weight(cast(nn.Linear, model.get_submodule(name)), model.dtype, device)
    make_rope(model, device)
