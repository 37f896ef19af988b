"""StableLM: Llama's linears behind LayerNorms with biases, one for both blocks where they say so.

Its LayerNorms become RMSNorms when a model is loaded. Norms of queries and keys, each head with its
own, stay LayerNorms: they act between linears that write no rotated space and R3. RoPE turns a part
of each head, which R3 does not miss.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.centred import NO_STOCK, prepare_centred, with_shared_norms
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.families.names import Names
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap


def _names(model: PreTrainedModel) -> Names:
    return replace(NAMES, mlp_norm=None) if model.config.use_parallel_residual else NAMES


def _prepare(model: PreTrainedModel) -> None:
    prepare_centred(model, _names(model))


def _read(model: PreTrainedModel) -> ModelMap:
    for layer in model.get_submodule(NAMES.layers).children():
        _check_rope(layer.get_submodule(NAMES.attention), model.get_submodule(NAMES.rope))
    found = read_decoder(model, _names(model))
    if model.config.qk_layernorm:
        found = replace(found, layers=tuple(_with_head_norms(layer) for layer in found.layers))
    return with_shared_norms(found) if model.config.use_parallel_residual else found


def _check_rope(attention: Any, rope: Any) -> None:
    """Raise InputError for a config whose head_dim is not that of the model's heads."""
    turned = 2 * rope.inv_freq.shape[0]
    if attention.rotary_ndims != turned:
        raise InputError(
            f"RoPE turns {turned} numbers of a head of {attention.head_dim}, where attention has "
            f"{attention.rotary_ndims}: leave head_dim out, and choose partial_rotary_factor so "
            "that it turns an even part of hidden_size / num_attention_heads"
        )


def _with_head_norms(layer: Layer) -> Layer:
    """Say that queries and keys go through norms, which are no RMSNorms."""
    path = layer.attention.path
    norms = {"query_norm": f"{path}.q_layernorm", "key_norm": f"{path}.k_layernorm"}
    return replace(layer, attention=replace(layer.attention, **norms, key_bias=False))


STABLELM = Family(_read, prepare=_prepare, no_stock=NO_STOCK)
