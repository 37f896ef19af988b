"""transformers configs from the settings of a user or of a checkpoint, which may say anything."""

import json
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.attention import PLAIN, register_plain
from spinlab.model.families import family_of
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of, prepare

# what a settings file says about code, files and numerics is ours to say
_NOT_READ = (
    *("auto_map", "custom_pipelines", "fusion_config", "transformers_weights"),
    *("_name_or_path", "quantization_config", "dtype", "torch_dtype"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
_WIDTHS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_WIDEST = 2**31 - 1
_DEEPEST = 2048  # layers; each is built, if only on the meta device


def config_from(prefix: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a supported family that settings describe; `prefix` says where they are.

    Raises InputError for a field of the wrong type or with an impossible value, and for settings
    that make no model.
    """
    return deepcopy(described(prefix, settings)[0])


def described(prefix: str, settings: dict[str, Any]) -> tuple[PreTrainedConfig, ModelMap]:
    """Return what `config_from` does, and the map of its models when prepared: both are shared."""
    shape = {name: value for name, value in settings.items() if name not in _NOT_READ}
    model_type = shape.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(f"{prefix}model_type={model_type} names no model family")
    family_of(model_type)
    for name in _WIDTHS:
        _check_count(f"{prefix}{name}", shape.get(name), _WIDEST)
    _check_count(f"{prefix}num_hidden_layers", shape.get("num_hidden_layers"), _DEEPEST)
    try:
        config, model_map = _made(json.dumps({"model_type": model_type, **shape}))
    except Exception as error:  # settings that are not a model's fail in any way
        raise InputError(f"{prefix.rstrip('.: ')}: {_reason(error)}") from error
    dimensions = model_map.dimensions
    if dimensions.cached.key_dim % 2:
        raise InputError(f"{prefix}head_dim={dimensions.head_dim} is odd, and RoPE turns pairs")
    if dimensions.heads % dimensions.kv_heads:
        raise InputError(
            f"{prefix}num_key_value_heads={dimensions.kv_heads} does not divide "
            f"num_attention_heads={dimensions.heads}"
        )
    return config, model_map


@lru_cache(maxsize=64)
def _made(settings: str) -> tuple[PreTrainedConfig, ModelMap]:
    """Return the config of settings in JSON, and the map of a model that was made of it.

    To make one takes seconds where there are many experts, and a run asks for it many times.
    """
    config = AutoConfig.for_model(**json.loads(settings))
    return config, map_of(prepare(on_meta(config)))


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the stock model of a config on the meta device: names, shapes and no numbers.

    Its config is a copy: a family that cuts a tie between embedding and head says so there.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config), **ours(config.model_type))


def ours(model_type: str) -> dict[str, Any]:
    """Return what transformers is told whenever it makes a model of a family."""
    register_plain()
    attention = PLAIN if family_of(model_type).own_attention else "sdpa"
    return {"trust_remote_code": False, "attn_implementation": attention}


def _check_count(name: str, value: Any, most: int) -> None:
    """Refuse a number below one, or beyond what a model is built with; the type is read later."""
    if isinstance(value, int) and value < 1:
        raise InputError(f"{name}={value} must be positive")
    if isinstance(value, int) and value > most:
        raise InputError(f"{name}={value} is out of range: at most {most}")


def _reason(error: Exception) -> str:
    """Say in one line why settings make no model."""
    if isinstance(error, InputError):  # of the family
        return str(error)
    if isinstance(error, StrictDataclassError):  # its cause is the sentence without bookkeeping
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return " ".join(str(error).split())
    if isinstance(error, KeyError):  # an activation or a kind of RoPE
        return f"transformers lacks {error.args[0]}"
    return f"transformers makes no model of it ({type(error).__name__}: {error})"
