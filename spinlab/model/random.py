"""Models of a configured shape with random weights, for tests, benchmarks and dry runs."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.seams import dimensions_of, family_of, layers_of, linear_at

# transformers takes these too, though not every family's config class declares them
_UNDECLARED = ("head_dim", "rope_theta", "rope_scaling")
_WIDTHS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def architecture_of(config: ModelConfig) -> PreTrainedConfig:
    """Return the transformers config that model.architecture describes; `model_type` is llama.

    Raises InputError naming the field that is unknown to the family or has an impossible value.
    """
    if not config.architecture:
        raise InputError(
            f"model.weights=random needs model.architecture, which {config.name} lacks"
        )
    # no padding: a family's default padding token can lie outside a small vocabulary
    shape = {"pad_token_id": None, **config.architecture}
    model_type = shape.pop("model_type", "llama")
    family_of(model_type)
    _check_names(model_type, shape)
    for name in _WIDTHS:
        if isinstance(shape.get(name), int) and shape[name] < 1:
            raise InputError(f"model.architecture.{name}={shape[name]} must be positive")
    try:
        found = AutoConfig.for_model(model_type, **shape)
    except StrictDataclassError as error:  # its cause is the sentence without the bookkeeping
        raise InputError(f"model.architecture: {error.__cause__ or error}") from error
    dimensions = dimensions_of(found)
    if dimensions.heads % dimensions.kv_heads:
        raise InputError(
            f"model.architecture.num_key_value_heads={dimensions.kv_heads} does not divide "
            f"num_attention_heads={dimensions.heads}"
        )
    return found


def _check_names(model_type: str, shape: dict[str, Any]) -> None:
    """Raise InputError for a field that transformers would take in silence and never read."""
    known = {f.name for f in fields(type(AutoConfig.for_model(model_type)))}
    known = (known - {f.name for f in fields(PreTrainedConfig)}) | set(_UNDECLARED)
    for name in shape:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known))}"
            raise InputError(f"model.architecture.{name} is no field of {model_type}: {hint}")


def random_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Make a stock model of the configured shape with seeded weights, gains, biases and outliers.

    A few channels of the embedding are scaled up and the gains of the norms that read the stream
    down by as much: the function stays ordinary, but what linears read once gains are folded has
    the outliers of trained models. Biases are drawn as well: transformers starts them at zero.
    """
    architecture = architecture_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(architecture)
        except KeyError as error:  # an activation or a kind of RoPE
            raise InputError(f"model.architecture: transformers lacks {error.args[0]}") from error
        outliers = torch.randperm(architecture.hidden_size)[: config.outlier_channels]
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.data.uniform_(
                    -0.1, 0.1
                )  # within what weights of deviation 0.02 add up to
    family = family_of(architecture.model_type)
    for norm in _stream_norms(model):
        norm.weight.data[outliers] /= config.outlier_scale
    linear_at(model, family.embedding).weight.data[:, outliers] *= config.outlier_scale
    return model


def _stream_norms(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the norms that read the residual stream; those of single heads are not among them."""
    family = family_of(model.config.model_type)
    inner = [linear_at(layer, name) for layer in layers_of(model) for name in family.norms]
    return [*inner, linear_at(model, family.final_norm)]
