"""A model's shape: stock modules on the meta device, which has names and widths and no numbers."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from spinlab.config import ModelConfig
from spinlab.data.assets import packaged_file
from spinlab.model.random import architecture_of
from spinlab.model.split import split_fused


def meta_model(config: ModelConfig) -> PreTrainedModel:
    """Return the configured model on the meta device, its fused linears split."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_settings(config))
    split_fused(model)
    return model


def _settings(config: ModelConfig) -> PreTrainedConfig:
    if config.weights == "random":
        return architecture_of(config)
    if config.path:
        return AutoConfig.from_pretrained(Path(config.path).expanduser())
    if config.package:
        file = packaged_file(config.package, config.file or "")
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return AutoConfig.from_pretrained(config.hub or "", revision=config.revision)
