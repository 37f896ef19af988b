"""The modules of a model, found by its map."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families import family_of
from spinlab.model.map import ModelMap, Site

_MAP = "model_map"  # attribute of a model


def map_of(model: PreTrainedModel) -> ModelMap:
    """Return a model's map: read from its modules at the first call, kept with the model then.

    Whatever swaps modules afterwards keeps their places, and what a copy of the model has is a copy
    of it. Raises InputError for a family that is not supported.
    """
    if _MAP not in vars(model):
        setattr(model, _MAP, family_of(model.config.model_type).read(model))
    return getattr(model, _MAP)


def set_map(model: PreTrainedModel, found: ModelMap) -> None:
    """Say what is there of a model, of which the rest comes later or not at all."""
    setattr(model, _MAP, found)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Bring a stock model to modules that its map names, in place."""
    family_of(model.config.model_type).prepare(model)
    return model


def restore(model: PreTrainedModel) -> None:
    """Undo `prepare` in place, so that the model saves as a stock checkpoint."""
    family_of(model.config.model_type).restore(model)


def linears_of(model: PreTrainedModel) -> Iterator[tuple[Site, nn.Linear]]:
    """Yield every site with its linear, as they are computed."""
    for site in map_of(model).sites:
        yield site, linear_at(model, site.path)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """Return a linear, or a fake-quantized one; raise TypeError for any other module."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{path} is a {type(module).__name__}, no linear")
    return module


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers in order, of a part of a model those that are there."""
    return [model.get_submodule(layer.path) for layer in map_of(model).there.values()]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model between token ids and its head."""
    return model.get_submodule(map_of(model).decoder)


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """Return the embedding; its weight is (vocabulary, hidden)."""
    return cast(nn.Embedding, model.get_submodule(map_of(model).embedding))


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the head; its weight is (vocabulary, hidden)."""
    return linear_at(model, map_of(model).head)


def read_by_head(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return what the head multiplies to logits for token ids (batch, tokens), none of them cached.

    (batch, tokens, hidden), divided by what else would divide the logits.
    """
    hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0]
    divisor = map_of(model).logit_divisor
    return hidden if divisor == 1 else hidden / divisor


def ends_of(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    """Return embedding and head."""
    return embedding_of(model), head_of(model)


def make_rope(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model on the meta device the frequencies of RoPE, which are in no checkpoint."""
    path = map_of(model).rope
    rope = cast(Any, model.get_submodule(path))
    model.set_submodule(path, type(rope)(config=model.config).to(device))


def norm_at(model: PreTrainedModel, path: str) -> Any:
    """Return a norm, of transformers or torch: a module with a weight (width,)."""
    return model.get_submodule(path)
