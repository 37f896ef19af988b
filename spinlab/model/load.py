"""Load stock transformers models: packaged GGUF, a local folder, the hub, or random weights."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spinlab.config import ModelConfig
from spinlab.data.assets import packaged_file
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.random import architecture_of, random_model
from spinlab.model.seams import family_of
from spinlab.model.split import split_fused
from spinlab.stage import file_digest

log = logging.getLogger(__name__)


def source_digest(config: ModelConfig) -> dict:
    """Identify the weights for cache keys: digests of files, or the hub's commit, or the shape.

    Raises InputError for a model that cannot be reached or rotated, before anything is loaded.
    """
    if config.weights == "random":
        architecture_of(config)
        return {"random": config.architecture}
    if config.path:
        return _folder_digests(Path(config.path).expanduser())
    if config.package:
        return {"gguf": file_digest(packaged_file(config.package, config.file or ""))}
    return {"hub": config.hub, "commit": _hub_commit(config.hub or "", config.revision)}


def _folder_digests(folder: Path) -> dict[str, str]:
    """Digest the weights and settings of a local checkpoint."""
    if not (folder / "config.json").is_file():
        raise InputError(f"model.path={folder} holds no config.json: give a checkpoint folder")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_rotatable(f"model.path={folder}", settings)
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"model.path={folder} holds no *.safetensors: pickled weights are not read"
        )
    kinds = (".safetensors", ".json", ".model", ".txt")  # weights, settings, tokenizers
    files = sorted(f for f in folder.iterdir() if f.suffix in kinds)
    return {file.name: file_digest(file) for file in files}


def _hub_commit(hub: str, revision: str) -> str:
    """Resolve a hub revision to a commit, from the hub or its local copy."""
    try:
        found = AutoConfig.from_pretrained(hub, revision=revision)
    except OSError as error:
        raise InputError(
            f"cannot load {hub} from the hub: log in for a gated model, "
            "or set model.path=/a/local/folder, or model.weights=random for shapes only"
        ) from error
    _check_rotatable(f"model.hub={hub}", found.to_dict())
    commit = getattr(found, "_commit_hash", None)
    if commit is None:
        raise InputError(
            f"{hub} at {revision} has no commit to cite: use model.path for local files"
        )
    return commit


def _check_rotatable(place: str, settings: dict) -> None:
    """Raise InputError for a checkpoint of an unsupported family, or without float weights."""
    family_of(settings.get("model_type"))
    quantization = settings.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed method")
        raise InputError(
            f"{place} is stored quantized ({method}), and only float weights can be rotated: "
            "name the checkpoint it was made from"
        )


def convert_gguf(config: ModelConfig, folder: Path) -> None:
    """Dequantize a packaged GGUF checkpoint to float32 safetensors plus tokenizer in `folder`."""
    gguf = packaged_file(config.package or "", config.file or "")
    where, name = gguf.parent, gguf.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # saved as an ordinary checkpoint: the weights are plain floats from here on
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    setattr(model, "hf_quantizer", None)  # noqa: B010 - an attribute transformers declares oddly
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


def load_model(config: ModelConfig, converted: Path | None, seed: int) -> PreTrainedModel:
    """Return the model in its configured dtype and evaluation mode, frozen, on the CPU.

    `converted` is the folder that `convert_gguf` filled, for packaged models. Fused linears come
    split; `spinlab.model.split.join_fused` makes the model stock again.
    """
    dtype = getattr(torch, config.dtype)
    if config.weights == "random":
        model = random_model(config, seed)
    else:
        where, revision = _checkpoint(config, converted)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, revision=revision, use_safetensors=True
        )
    return _prepared(model, dtype)


def meta_model(config: ModelConfig, converted: Path | None = None) -> PreTrainedModel:
    """Return the model that `load_model` gives, on the meta device: names, shapes and no numbers.

    A packaged model that is not converted yet is described by its own metadata.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_settings(config, converted))
    return _prepared(model, getattr(torch, config.dtype))


def _settings(config: ModelConfig, converted: Path | None) -> PreTrainedConfig:
    """Return the transformers config of a model that need not be loaded."""
    if config.weights == "random":
        return architecture_of(config)
    if config.package and not (converted or config.path):
        gguf = packaged_file(config.package, config.file or "")
        return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    where, revision = _checkpoint(config, converted)
    return AutoConfig.from_pretrained(where, revision=revision)


def _prepared(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Split fused linears, bring the numbers to a dtype and freeze them."""
    split_fused(model)
    if dtype == torch.float64:
        exact_norms(model)
    return cast_model(model, dtype).eval().requires_grad_(False)


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Bring a model's numbers to a dtype, in place, except the frequencies of RoPE.

    `Module.to` would round those too: in bfloat16 angles are off by whole turns at 2048 tokens.
    """
    for tensor in (*model.parameters(), *_buffers(model)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _buffers(model: PreTrainedModel) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "inv_freq" not in name]


def exact_norms(model: PreTrainedModel) -> None:
    """Replace RMSNorms by torch's own: in one kernel, and in float64 where the model is.

    transformers' compute in float32, whatever the dtype, step by step.
    """
    modules = cast(list[tuple[str, Any]], list(model.named_modules()))
    for name, norm in modules:
        if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, nn.RMSNorm):
            exact = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, device="meta")
            exact.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
            model.set_submodule(name, exact)


def _checkpoint(config: ModelConfig, converted: Path | None) -> tuple[str | Path, str]:
    """Return what `from_pretrained` takes: a folder, or a hub id with the commit it stands at."""
    if converted or config.path:
        return converted or Path(config.path or "").expanduser(), "main"
    return config.hub or "", _hub_commit(config.hub or "", config.revision)


def load_tokenizer(config: ModelConfig, converted: Path | None) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; random models read bytes."""
    if config.weights == "random":
        return byte_tokenizer()
    where, revision = _checkpoint(config, converted)
    return AutoTokenizer.from_pretrained(where, revision=revision)
