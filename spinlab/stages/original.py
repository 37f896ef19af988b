"""The original model: what identifies it, its names and widths, its tokenizer, fresh copies of it.

Stages `check`, which looks at every weight once, and `model`, which dequantizes a packaged one.
"""

from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.cache import NotCached
from spinlab.config import ModelConfig, plain
from spinlab.model.gguf import convert_gguf
from spinlab.model.load import (
    check_model,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    source_digest,
)
from spinlab.model.modules import map_of
from spinlab.model.network import Make, Network, Resident, Streamed
from spinlab.model.parts import Parts
from spinlab.stages.run import Run


class Original:
    """Give the model that an experiment starts from, each part made when it is first asked for."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.config.model
        self._known_parts: dict[str, Parts] = {}  # by dtype

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the model, for keys. Its numbers are looked at once."""
        model = self.settings
        random = model.weights == "random"
        _ = self.shape  # a model that is not whole fails before anything of it is read
        digest = source_digest(model)
        if not random and not model.is_gguf:  # a packaged one is looked at when it is converted
            self.run.cache.run("check", digest, lambda out: check_weights(model))
        seed = self.run.config.seed
        shape = [model.outlier_channels, model.outlier_scale, seed] if random else None
        return {"digest": digest, "dtype": model.dtype, "random": shape}

    @cached_property
    def converted(self) -> Path | None:
        """The folder of a packaged model's dequantized checkpoint."""
        model = self.settings
        if not model.is_gguf:
            return None
        depends = source_digest(model)
        return self.run.cache.run("model", depends, lambda out: convert_gguf(model, out)).path

    @cached_property
    def shape(self) -> PreTrainedModel:
        """The model on the meta device: its names and widths, without its weights.

        A model that cannot be had, or is not whole, fails here with a sentence.
        """
        check_model(self.settings)
        converted = None
        with suppress(NotCached), self.run.cache.only_cached():
            converted = self.converted  # a packaged model's own metadata take seconds to read
        return meta_model(self.settings, converted)

    @property
    def kv_settings(self) -> dict[str, Any]:
        """Name the settings of the KV cache that this model's numbers depend on, for keys."""
        kv = self.run.config.kv
        found = plain(kv)
        if not (kv.codes("keys") and map_of(self.shape).key_biases):
            del found["key_bias"]
        return found | ({"seed": self.run.config.seed} if kv.draws else {})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings, self.converted)

    def load(self, settings: ModelConfig | None = None) -> PreTrainedModel:
        """Return a fresh copy of the model on the device; settings: with another dtype."""
        model = load_model(settings or self.settings, self.converted, self.run.config.seed)
        return cast(PreTrainedModel, nn.Module.to(model, self.run.device))

    def network(self, make: Make, settings: ModelConfig | None = None) -> Network:
        """Return what `make` makes of the model, or of one part after the other with offload.

        settings: with another dtype. A network of parts reads the checkpoint whenever it is run.
        """
        if not self.run.config.runtime.offload:
            return Resident(partial(make, partial(self.load, settings)))
        return self.in_parts(make, settings)

    def in_parts(self, make: Make, settings: ModelConfig | None = None) -> Network:
        """Return such a network of parts, whatever the settings say of offload.

        Random weights are in no file that parts could be read from: their network is there as a
        whole.
        """
        if self.settings.weights == "random":
            return Resident(partial(make, partial(self.load, settings)))
        parts = self._parts(settings or self.settings)

        def part(layer: int | None) -> PreTrainedModel:
            return make(partial(parts.part, layer, self.run.device))

        return Streamed(part, parts.layers)

    def _parts(self, settings: ModelConfig) -> Parts:
        """Return what loads parts of the model in a dtype; its map is read once."""
        if settings.dtype not in self._known_parts:
            self._known_parts[settings.dtype] = Parts(settings, self.converted)
        return self._known_parts[settings.dtype]
