"""Load stock transformers models: packaged GGUF, a local folder, the hub, or random weights."""

import json
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spinlab.config import ModelConfig
from spinlab.data.assets import packaged_file
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.seams import LLAMA, Family, family_of, layers_of, linear_at
from spinlab.stage import file_digest

log = logging.getLogger(__name__)


def source_digest(config: ModelConfig) -> dict:
    """Identify the weights for cache keys: digests of files, or the hub's commit, or the shape.

    Raises InputError for a model that cannot be reached or whose family has no seam table,
    before anything is loaded.
    """
    if config.weights == "random":
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
    family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
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
    family_of(found.model_type)
    commit = getattr(found, "_commit_hash", None)
    if commit is None:
        raise InputError(
            f"{hub} at {revision} has no commit to cite: use model.path for local files"
        )
    return commit


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
    """Return the model in float32 or float64 evaluation mode, frozen, on the CPU.

    `converted` is the folder that `convert_gguf` filled, for packaged models.
    """
    dtype = getattr(torch, config.dtype)
    if config.weights == "random":
        model = random_model(config, seed)
    else:
        where, revision = _checkpoint(config, converted)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, revision=revision, use_safetensors=True
        )
    family = family_of(model.config.model_type)
    if dtype == torch.float64:
        exact_norms(model, family)
    return model.to(dtype).eval().requires_grad_(False)


def exact_norms(model: PreTrainedModel, family: Family) -> None:
    """Replace RMSNorms by torch's own: transformers' compute in float32, whatever the dtype."""
    places = [(layer, name) for layer in layers_of(model) for name in family.norms]
    for parent, name in [*places, (model, family.final_norm)]:
        old = linear_at(parent, name)
        exact = nn.RMSNorm(old.weight.shape[0], eps=model.config.rms_norm_eps)
        exact.load_state_dict(old.state_dict())
        parent.set_submodule(name, exact)


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


def random_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Make a Llama of the configured shape with seeded weights, norm gains and outlier channels.

    A few channels of the embedding are scaled up and their norm gains down by as much: the
    function stays ordinary, but what linears read once gains are folded has the outliers of
    trained models.
    """
    if not config.architecture:
        raise InputError(
            f"model.weights=random needs model.architecture, which {config.name} lacks"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config.architecture))
        outliers = torch.randperm(model.config.hidden_size)[: config.outlier_channels]
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)[outliers] /= config.outlier_scale
    linear_at(model, LLAMA.embedding).weight.data[:, outliers] *= config.outlier_scale
    return model
