"""The first stages of an experiment: the original model, its tokenizer, and the text as tokens."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config, ModelConfig
from spinlab.data.text import Text, fixed_windows, random_windows, read_texts, tokenize
from spinlab.device import choose_device
from spinlab.errors import InputError
from spinlab.files import write_tensors
from spinlab.model.gguf import convert_gguf
from spinlab.model.load import (
    check_model,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    source_digest,
    tokenizer_digest,
    vocabulary,
)
from spinlab.stage import NotCached, Stages


class Sources:
    """Hold what every later stage starts from: settings, cache, device, model and text."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stages = Stages(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)

    # the model ------------------------------------------------------------------------------

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the original model, for keys. Its numbers are looked at once."""
        model = self.config.model
        random = model.weights == "random"
        _ = self.shape  # a model that is not whole fails before anything of it is read
        digest = source_digest(model)
        if not random and not model.is_gguf:  # a packaged one is looked at when it is converted
            self.stages.run("check", digest, lambda out: check_weights(model), ("model",))
        shape = [model.outlier_channels, model.outlier_scale, self.config.seed] if random else None
        return {"digest": digest, "dtype": model.dtype, "random": shape}

    @cached_property
    def converted(self) -> Path | None:
        """The folder of a packaged model's dequantized checkpoint."""
        model = self.config.model
        if not model.is_gguf:
            return None
        depends = source_digest(model)
        return self.stages.run("model", depends, lambda out: convert_gguf(model, out), ("model",))[
            0
        ]

    @cached_property
    def shape(self) -> PreTrainedModel:
        """The original model on the meta device: its names and widths, without its weights.

        A model that cannot be had, or is not whole, fails here with a sentence.
        """
        check_model(self.config.model)
        converted = None
        with suppress(NotCached), self.stages.only_cached():
            converted = self.converted  # a packaged model's own metadata take seconds to read
        return meta_model(self.config.model, converted)

    def original(self, model_config: ModelConfig | None = None) -> PreTrainedModel:
        """Return a fresh copy of the original model on the device."""
        model = load_model(model_config or self.config.model, self.converted, self.config.seed)
        return cast(PreTrainedModel, nn.Module.to(model, self.device))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model, self.converted)

    # the text -------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> tuple[Text, list[Text]]:
        """The calibration text and the evaluation texts."""
        return read_texts(self.config.data)

    @cached_property
    def calibration(self) -> tuple[Path, str]:
        """A file with the calibration tokens, whatever their text is called, and its key."""
        text = replace(self.texts[0], label="tokens")
        return self._tokenized("calibration", [text], [], lambda name, ids: ids)

    @property
    def calibration_tokens(self) -> torch.Tensor:
        """The calibration text as token ids: (N,)."""
        return load_file(self.calibration[0])["tokens"]

    @cached_property
    def evaluation(self) -> tuple[Path, str]:
        """A file with the evaluation windows of every text, and its key."""
        window, most = self.config.eval.window, self.config.eval.max_windows

        def windows(name: str, ids: torch.Tensor) -> torch.Tensor:
            return fixed_windows(ids, window, most, name).contiguous()

        return self._tokenized("evaluation", self.texts[1], [window, most], windows)

    def _tokenized(
        self,
        stage: str,
        texts: list[Text],
        settings: list,
        cut: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> tuple[Path, str]:
        """Keep the tokens of texts as one file, apart from what else they are used for."""
        digests = {text.label: text.digest for text in texts}
        tokens = tokenizer_digest(self.config.model)  # a model that cannot be had fails here
        tokenizer = self.tokenizer  # a packaged one is converted, as a stage of its own
        known = vocabulary(self.config.model, self.converted)
        _ = self.source  # weights are looked at before anything comes of them

        def work(out: Path) -> None:
            ids = {text.label: tokenize(text.text, tokenizer) for text in texts}
            for label, row in ids.items():
                self._check_ids(label, row, known)
            rows = {label: cut(label, row) for label, row in ids.items()}
            write_tensors(out / "tokens.safetensors", rows)

        depends = [tokens, known, digests, settings]
        folder, key = self.stages.run(stage, depends, work, ("data", "sources"))
        return folder / "tokens.safetensors", key

    @staticmethod
    def _check_ids(name: str, ids: torch.Tensor, known: int) -> None:
        """Refuse a text with special tokens that the tokenizer has and the model has not."""
        if len(ids) and (last := int(ids.max())) >= known:
            raise InputError(
                f"text {name!r} holds token {last}, which the tokenizer knows and the model, with "
                f"vocab_size={known}, does not: take the tokenizer that it was trained with"
            )

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) calibration windows, the same for the same seed and purpose."""
        return random_windows(self.calibration_tokens, length, count, self.generator(purpose))

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
