"""The first stages of an experiment: the original model, its tokenizer, and the text as tokens."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config, ModelConfig
from spinlab.data.text import fixed_windows, random_windows, read_text, tokenize
from spinlab.device import choose_device
from spinlab.model.load import convert_gguf, load_model, load_tokenizer, meta_model, source_digest
from spinlab.stage import Stages


class Sources:
    """Hold what every later stage starts from: settings, cache, device, model and text."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stages = Stages(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)

    # the model ------------------------------------------------------------------------------

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the original model, for keys."""
        model = self.config.model
        random = model.weights == "random"
        shape = [model.outlier_channels, model.outlier_scale, self.config.seed] if random else None
        return {"digest": source_digest(model), "dtype": model.dtype, "random": shape}

    @cached_property
    def converted(self) -> Path | None:
        """The folder of a packaged model's dequantized checkpoint."""
        model = self.config.model
        if model.weights == "random" or model.path or not model.package:
            return None
        depends = self.source["digest"]
        return self.stages.run("model", depends, lambda out: convert_gguf(model, out), ("model",))[
            0
        ]

    def original(self, model_config: ModelConfig | None = None) -> PreTrainedModel:
        """Return a fresh copy of the original model on the device."""
        model = load_model(model_config or self.config.model, self.converted, self.config.seed)
        return cast(PreTrainedModel, nn.Module.to(model, self.device))

    @cached_property
    def shape(self) -> PreTrainedModel:
        """The original model on the meta device: its names and widths, without its weights."""
        assert self.source  # a model that cannot be had fails here, with a sentence
        return meta_model(self.config.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model, self.converted)

    # the text -------------------------------------------------------------------------------

    @cached_property
    def calibration(self) -> tuple[Path, str]:
        """A file with the calibration tokens, and its key."""
        name = self.config.data.calibration

        texts = {name: read_text(name)[0]}
        return self._tokenized("calibration", texts, [], lambda name, ids: ids)

    @cached_property
    def evaluation(self) -> tuple[Path, str]:
        """A file with the evaluation windows of every text, and its key."""
        window, most = self.config.eval.window, self.config.eval.max_windows
        texts = {name: read_text(name)[1] for name in self.config.data.evaluation}

        def windows(name: str, ids: torch.Tensor) -> torch.Tensor:
            return fixed_windows(ids, window, most, name).contiguous()

        return self._tokenized("evaluation", texts, [window, most], windows)

    def _tokenized(
        self,
        stage: str,
        texts: dict[str, str],
        settings: list,
        cut: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> tuple[Path, str]:
        """Keep the tokens of named texts as one file, apart from what else they are used for."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        source = self.source["digest"]  # a model that cannot be had fails here
        tokenizer = self.tokenizer  # and a packaged one is converted, as a stage of its own

        def work(out: Path) -> None:
            rows = {name: cut(name, tokenize(text, tokenizer)) for name, text in texts.items()}
            save_file(rows, out / "tokens.safetensors")

        folder, key = self.stages.run(stage, [source, digests, settings], work, ("data",))
        return folder / "tokens.safetensors", key

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) calibration windows, the same for the same seed and purpose."""
        name = self.config.data.calibration
        ids = load_file(self.calibration[0])[name]
        return random_windows(ids, length, count, self.generator(purpose), f"{name}, for {purpose}")

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
