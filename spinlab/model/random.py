"""Models of a configured shape with random weights, for tests, benchmarks and dry runs."""

import json
from copy import deepcopy
from dataclasses import fields
from functools import cache
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from spinlab.config import ModelConfig
from spinlab.errors import InputError, did_you_mean
from spinlab.model.families import family_of
from spinlab.model.map import ModelMap, Norm
from spinlab.model.modules import norm_at
from spinlab.model.settings import described, ours

# transformers takes these too, though not every family's config class declares them
_UNDECLARED = ("head_dim", "rope_theta", "rope_scaling")


def architecture_of(config: ModelConfig) -> PreTrainedConfig:
    """Return the transformers config that model.architecture describes; `model_type` is llama.

    Raises InputError naming the field that is unknown to the family or has an impossible value.
    """
    if not config.architecture:
        raise InputError(
            f"model.weights=random needs model.architecture, which {config.name} lacks"
        )
    return deepcopy(_described(json.dumps(config.architecture))[0])


@cache
def _described(architecture: str) -> tuple[PreTrainedConfig, ModelMap]:
    """Return the config of an architecture in JSON, and the map of its models when prepared."""
    # no padding: a family's default padding token can lie outside a small vocabulary
    shape = {"pad_token_id": None, **json.loads(architecture)}
    shape.setdefault("model_type", "llama")
    _check_fields(shape)
    return described("model.architecture.", shape)


def _check_fields(shape: dict[str, Any]) -> None:
    """Raise InputError for a field that transformers would take in silence and never read."""
    model_type = shape["model_type"]
    family_of(model_type)
    known = {f.name for f in fields(type(AutoConfig.for_model(model_type)))}
    known = (known - {f.name for f in fields(PreTrainedConfig)}) | {"model_type", *_UNDECLARED}
    for name in shape:
        if name not in known:
            hint = did_you_mean(name, sorted(known), f"transformers' configuration of {model_type}")
            raise InputError(f"model.architecture.{name} is no field of {model_type}: {hint}")


def random_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Make a stock model of the configured shape with seeded weights, gains, biases and outliers.

    A few channels of the embedding are scaled up and the gains of the norms that read the stream
    down by as much: the function stays ordinary, but what linears read once gains are folded has
    the outliers of trained models. Biases are drawn as well: transformers starts them at zero.
    """
    architecture = architecture_of(config)
    if config.outlier_channels > architecture.hidden_size:
        raise InputError(
            f"model.outlier_channels={config.outlier_channels} is more than "
            f"hidden_size={architecture.hidden_size}"
        )
    # the norms and ends of a stock model are where those of a prepared one are
    described = _described(json.dumps(config.architecture))[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of no GPU: nothing is drawn there
        model = AutoModelForCausalLM.from_config(architecture, **ours(architecture.model_type))
        outliers = torch.randperm(architecture.hidden_size)[: config.outlier_channels]
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            norm = described.norm_at.get(name.rpartition(".")[0])
            if norm is not None and not name.endswith("bias"):
                parameter.data.uniform_(0.5, 1.5).sub_(norm.offset)
            elif name.endswith("bias"):  # those of experts are stacked, a router's may be a buffer
                # within what weights of deviation 0.02 add up to
                parameter.data.uniform_(-0.1, 0.1)
    for norm in described.norms:
        if _norms_stream(norm, described):
            weight = norm_at(model, norm.path).weight.data
            weight[outliers] = (weight[outliers] + norm.offset) / config.outlier_scale - norm.offset
    cast(Any, model.get_submodule(described.embedding)).weight.data[:, outliers] *= (
        config.outlier_scale
    )
    return model


def _norms_stream(norm: Norm, described: ModelMap) -> bool:
    """Tell whether a norm reads the stream, and not what a linear gives."""
    if norm.layer is None:
        return True
    return any(described.site_at[reader].reads == "R1" for reader in norm.readers)
