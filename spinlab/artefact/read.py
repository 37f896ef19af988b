"""From an artefact to a model that runs on integers, weight by weight.

Packed weights go from the file to where they are multiplied: the floats that they stand for are
never there. Nothing of the folder is run, unpickled or looked up elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from spinlab.artefact.weights import StoredWeights
from spinlab.device import choose_backend, choose_device
from spinlab.errors import InputError
from spinlab.export.listing import read_listing
from spinlab.export.network import REST, ROTATIONS, WEIGHTS, network_from
from spinlab.fakequant.peaks import check_peaks
from spinlab.kv.path import kv_path
from spinlab.model.checkpoint import Checkpoint
from spinlab.model.files import CONFIG, GENERATION, TOKENIZER, read_json
from spinlab.model.load import prepared
from spinlab.model.modules import ends_of, make_rope, map_of
from spinlab.model.settings import on_meta
from spinlab.rotation.fuse import fuse_ends
from spinlab.rotation.stored import read_stored
from spinlab.runtime.choice import run_on_integers
from spinlab.runtime.quantized import Quantized
from spinlab.weights.quantized import empty_weight, set_dequantized

KIND = "artefact"  # of the export
_NEEDS = (CONFIG, GENERATION, WEIGHTS, REST, ROTATIONS)
_READS = (*TOKENIZER, "additional_chat_templates/*")


def load(folder: str | Path, backend: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Return the quantized network of an artefact as a transformers model, in evaluation mode.

    forward() and generate() are transformers' own; keys and values are cached packed. backend and
    device are chosen as by `runtime.backend` and `runtime.device`. On the same ones, with as many
    threads and MKL asked to repeat its sums (`MKL_CBWR`), logits have the bits of the run that
    wrote the artefact. Raises InputError for a folder that is not whole, was altered, or comes from
    a version that this one does not read.
    """
    on = choose_device(device)
    return Artefact(folder).model(on, choose_backend(backend, on))


class Artefact:
    """Name a folder that is whole and unaltered; its tensors are read when a model is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.place, self.folder = str(folder), Path(folder).expanduser()
        self.about = read_listing(self.place, self.folder, KIND, _NEEDS, _READS)
        self.network = network_from(self.place, self.about.get("network"))

    @property
    def checkpoint(self) -> Checkpoint:
        """Its config and its tokenizer."""
        return Checkpoint(self.place, self.folder, {"folder": self.folder.resolve().name})

    def model(self, device: torch.device, backend: str) -> PreTrainedModel:
        """Return the network on a device and a back end that `spinlab.device` has chosen."""
        dtype = getattr(torch, self.network.dtype)
        model = prepared(on_meta(self.checkpoint.config), dtype)
        try:
            generation = GenerationConfig.from_dict(read_json(self.folder / GENERATION))
            parts = self._parts(model, device)
            self._fill(model, parts, device)
        except InputError:
            raise
        except Exception as error:  # files that are no artefact's fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{self.place} cannot be read: {reason:.200}") from error
        run_on_integers(model, parts, backend)
        model.generation_config = generation
        return model

    def _parts(self, model: PreTrainedModel, device: torch.device) -> Quantized:
        """Return what the model becomes a quantized network with; all of it fits the model."""
        model_map, network = map_of(model), self.network
        rotations = read_stored(self.folder / ROTATIONS, model_map)
        check_peaks(model_map, rotations, network.quant)
        weights = StoredWeights(self.folder / WEIGHTS, device)
        paths = model_map.embedding, model_map.head
        ends = zip(paths, ends_of(model), strict=True)
        weights.check(self.place, model_map, {p: tuple(end.weight.shape) for p, end in ends})
        widths, names = model_map.coded_widths, model_map.attentions
        found = network.kv, widths, rotations.r3, network.seed, names
        kv = kv_path(*found, rotations.kv_clips)
        return Quantized(rotations, weights, network.quant, kv)

    def _fill(self, model: PreTrainedModel, parts: Quantized, device: torch.device) -> None:
        """Give a model on no device its numbers, but for those of packed weights."""
        tensors = model.state_dict()
        due = {name: tensors[name] for name in self.network.rest(model, parts.weights)}
        rest = {name: tensor.to(device) for name, tensor in self._rest(due).items()}
        model.load_state_dict(rest, strict=False, assign=True)
        for name in parts.weights:
            empty_weight(cast(nn.Linear, model.get_submodule(name)), model.dtype, device)
        if self.network.quant.tied.quantizes:
            embedding, head = ends_of(model)
            set_dequantized(embedding, parts.weights[map_of(model).embedding])
            head.weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
            fuse_ends(model, parts.rotations)
        make_rope(model, device)

    def _rest(self, due: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read the numbers that are in no packed weight. due: what they must be like, by name."""
        with safe_open(self.folder / REST, framework="pt") as file:
            if wrong := sorted(due.keys() ^ set(file.keys())):
                raise InputError(
                    f"{self.place}: {wrong[0]} is missing in {REST}, or has no place there"
                )
            # a copy: pages of the file may change with it
            found = {name: file.get_tensor(name).clone() for name in due}
        for name, tensor in found.items():
            has, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, due[name]))
            if has != wanted:
                raise InputError(f"{self.place}: {name} is {has}, and the model has {wanted}")
            if not tensor.isfinite().all():
                raise InputError(f"{self.place}: {name} holds numbers that are not finite")
        return found


def tokenizer_of(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an artefact."""
    return Artefact(folder).checkpoint.tokenizer()
