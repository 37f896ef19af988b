"""Parts of a checkpoint's model: one decoder layer, or its ends, each in a model of its own.

A part is the stock model with all other layers as passages without numbers. What folds, rotates and
rounds by a map (`ModelMap.part`) does to a part what it does to that part of the whole model.
"""

import copy
import re
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.checkpoint import checkpoint_of
from spinlab.model.load import meta_model, prepared
from spinlab.model.modules import ends_of, make_rope, map_of, norm_at, set_map
from spinlab.model.settings import on_meta
from spinlab.model.whole import check_report


class Passage(nn.Module):
    """Stand where a layer is not: hand on what it is given."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return x: (batch, tokens, hidden)."""
        return x


class _NoEmbedding(nn.Embedding):
    """An embedding without rows: every token is zeros, as wide as the stream."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return zeros for token ids (batch, tokens): (batch, tokens, hidden)."""
        return self.weight.new_zeros(*input.shape, self.embedding_dim)


class Parts:
    """Load parts of a model, in its configured dtype, frozen.

    Every number is read from its file when a part is asked for, and what a part holds is gone with
    it. Raises InputError for random weights, which are in no file.
    """

    def __init__(self, config: ModelConfig, converted: Path | None) -> None:
        if config.weights == "random":
            raise InputError(
                "runtime.offload=true reads layers from a checkpoint, and random weights are in "
                "none: use runtime.offload=false, or save the model and give model.path"
            )
        self._checkpoint = checkpoint_of(config, converted)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._map = map_of(meta_model(config, converted))

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return len(self._map.layers)

    def part(self, layer: int | None, device: torch.device) -> PreTrainedModel:
        """Return the model with a layer alone, or with its ends for None, on a device.

        Without ends the embedding gives zeros and there are no logits, of no token at all.
        """
        model = self._empty(layer)
        set_map(model, self._map.part(layer))
        if layer is not None:
            _take_ends(model)
        make_rope(model, torch.device("cpu"))
        self._read(model, layer)
        model = prepared(model, self._dtype, device)
        self._add_passages(model)
        if layer is None:
            with suppress(OSError):  # a folder that says nothing of it
                found = GenerationConfig.from_pretrained(self._checkpoint.folder)
                model.generation_config = found
        return model

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The stock model without numbers; layers are copied from it."""
        stock = on_meta(self._checkpoint.config)
        stock.config.dtype = self._dtype  # as loading would have it
        for parameter in stock.parameters():
            parameter.data = parameter.data.to(self._dtype)
        return stock

    @cached_property
    def _places(self) -> dict[str, Path]:
        """The file of every tensor, by its name."""
        found: dict[str, Path] = {}
        for file in self._checkpoint.weights:
            with safe_open(file, framework="pt") as stored:
                found |= dict.fromkeys(stored.keys(), file)
        return found

    def _empty(self, layer: int | None) -> PreTrainedModel:
        """Return a copy of the skeleton that has no other layer than this, under its number."""
        layers = self._list_in(self._skeleton)
        stock = dict(layers)
        kept = {} if layer is None else {str(layer): stock[str(layer)]}
        try:
            self._list_in(self._skeleton, kept)
            return copy.deepcopy(self._skeleton)
        finally:
            self._list_in(self._skeleton, stock)

    def _list_in(
        self, model: PreTrainedModel, layers: dict[str, nn.Module] | None = None
    ) -> dict[str, nn.Module]:
        """Return the layers of a model by number, which become others where they are given."""
        parent = model.get_submodule(self._map.layers[0].path.rpartition(".")[0])
        if layers is not None:
            parent._modules = dict(layers)
        return cast(dict[str, nn.Module], parent._modules)

    def _add_passages(self, model: PreTrainedModel) -> None:
        """Put passages where layers are not."""
        there = self._list_in(model)
        self._list_in(model, {n: there.get(n) or Passage() for n in self._list_in(self._skeleton)})

    def _read(self, model: PreTrainedModel, layer: int | None) -> None:
        """Fill a part with the numbers of its tensors, by transformers' own rules of loading."""
        names = [name for name in self._places if self._layer_of(name) == layer]
        with ExitStack() as open_files:
            files = {
                file: open_files.enter_context(safe_open(file, framework="pt"))
                for file in {self._places[name] for name in names}
            }
            slices = {name: files[self._places[name]].get_slice(name) for name in names}
            dtype = _narrowest({stored.get_dtype() for stored in slices.values()}, self._dtype)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            settings = LoadStateDictConfig(
                dtype=dtype, weight_mapping=cast(Any, get_model_conversion_mapping(model))
            )
            report, _ = convert_and_load_state_dict_in_model(model, slices, settings)
        model._adjust_missing_and_unexpected_keys(report)  # what loading a whole model ignores
        embedding, head = ends_of(model)
        missing = {name for name, p in model.named_parameters() if p.is_meta}
        if layer is None and model.config.tie_word_embeddings:
            head.weight = embedding.weight
            missing.discard(f"{self._map.head}.weight")
        found = {
            "missing_keys": missing,
            "unexpected_keys": report.unexpected_keys,
            "mismatched_keys": report.mismatched_keys,
            "error_msgs": report.error_msgs,
        }
        check_report(self._checkpoint.place, self._checkpoint.config, found)

    def _layer_of(self, name: str) -> int | None:
        """Return the layer that a checkpoint's tensor is of, None for the ends'."""
        *_, layers, _ = self._map.layers[0].path.split(".")
        found = re.search(rf"(?:^|\.){layers}\.(\d+)\.", name)
        return None if found is None else int(found[1])


def _narrowest(stored: set[str], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a part is read in: that of all its tensors in the files, if narrower.

    Then the device widens it, and the host never holds it in more bytes than the files.
    """
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    found = {halves.get(name, dtype) for name in stored}
    return found.pop() if len(found) == 1 and dtype.itemsize > 2 else dtype


def _take_ends(model: PreTrainedModel) -> None:
    """Leave an embedding and a head without rows, and a final norm that is not read."""
    embedding, head = ends_of(model)
    place, bare = map_of(model), _NoEmbedding(1, embedding.embedding_dim, device="meta")
    model.set_submodule(place.embedding, bare)
    for end in (bare, head):
        for name, parameter in list(end.named_parameters()):
            empty = torch.empty(0, *parameter.shape[1:], dtype=head.weight.dtype)
            setattr(end, name, nn.Parameter(empty))
    for name, parameter in list(norm_at(model, place.final_norm).named_parameters()):
        ones = nn.Parameter(torch.ones_like(parameter, device="cpu"))
        setattr(norm_at(model, place.final_norm), name, ones)
