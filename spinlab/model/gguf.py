"""Packaged GGUF checkpoints: identified by their bytes, described, dequantized once."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from spinlab.assets import packaged_file
from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.families import family_of
from spinlab.model.settings import ours
from spinlab.model.whole import check_report, is_finite

_MAGIC = b"GGUF"


def gguf_of(config: ModelConfig) -> Path:
    """Return a packaged model's file; raise InputError where there is none."""
    return packaged_file(config.package or "", config.file or "")


def gguf_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the transformers config that a packaged model's metadata describe.

    Raises InputError for a file that is no GGUF, is cut, or holds an unsupported family.
    """
    file = gguf_of(config)
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise InputError(f"{_place(config)} is no GGUF file: run `make setup` to install it")
    found = _read(AutoConfig.from_pretrained, config, trust_remote_code=False)
    family_of(found.model_type)
    return found


def convert_gguf(config: ModelConfig, folder: Path) -> None:
    """Dequantize a packaged model to float32 safetensors plus tokenizer in `folder`.

    Raises InputError where tensors lack, are too many or are not finite.
    """
    described = gguf_config(config)
    load = partial(AutoModelForCausalLM.from_pretrained, config=described)  # else it reads it again
    settings = {"dtype": torch.float32, "output_loading_info": True, **ours(described.model_type)}
    model, report = _read(load, config, **settings)
    check_report(_place(config), described, report)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise InputError(f"{_place(config)}: {name} holds NaN or infinity: use another file")
    _save(model, folder)
    _read(AutoTokenizer.from_pretrained, config, trust_remote_code=False).save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save as an ordinary checkpoint: the weights are plain floats from here on."""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    setattr(model, "hf_quantizer", None)  # noqa: B010 - an attribute transformers declares oddly
    model.save_pretrained(folder)


def _read(load: Any, config: ModelConfig, **settings: Any) -> Any:
    """Let transformers read one part of the file; a sentence for whatever it trips over."""
    file = gguf_of(config)
    try:
        return load(file.parent, gguf_file=file.name, local_files_only=True, **settings)
    except Exception as error:  # a reader fed with other bytes fails in any way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{_place(config)} is cut or no GGUF that transformers reads ({said}): "
            "run `make setup` to install it again"
        ) from error


def _place(config: ModelConfig) -> str:
    return f"model.file={config.file} of {config.package}"
