"""StableLM: Llama's linears behind LayerNorms with biases, one for both blocks where they say so.

A LayerNorm is an RMSNorm of what has mean zero, times a gain, plus a bias (SliceGPT, arXiv
2401.15024). So when a model is loaded, what writes the stream writes it less its mean, LayerNorms
become RMSNorms, and their biases move through the linears that read them, the head among them.
Norms of queries and keys, each head with its own, stay LayerNorms: they act between linears that
write no rotated space and R3. RoPE turns a part of each head, which R3 does not miss.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.map import Family, Input, Layer, ModelMap, Norm

_NO_STOCK = "its LayerNorms would subtract the mean of a rotated stream, which the original has not"


def _prepare(model: PreTrainedModel) -> None:
    """Make a stock model's LayerNorms RMSNorms, in place; every number is rounded once."""
    embedding: Any = model.get_submodule(NAMES.embedding)
    head: Any = model.get_submodule(NAMES.head)
    if head.weight is embedding.weight:  # the head reads what it did
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    _centre(embedding, 1)
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        _centre(attention.o_proj, 0)
        _centre(mlp.down_proj, 0)
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        of_mlp = [mlp.gate_proj, mlp.up_proj]
        if layer.use_parallel_residual:
            _to_rms(layer, NAMES.attention_norm, [*readers, *of_mlp])
        else:
            _to_rms(layer, NAMES.attention_norm, readers)
            _to_rms(layer, NAMES.mlp_norm, of_mlp)
    _to_rms(model, NAMES.final_norm, [head])


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(model.get_submodule(NAMES.layers).children())


def _centre(module: Any, dim: int) -> None:
    """Let the vectors along a dimension of a weight, which are added to the stream, have mean 0."""
    wide = module.weight.data.double()
    module.weight.data = (wide - wide.mean(dim, keepdim=True)).to(module.weight.dtype)


def _to_rms(parent: nn.Module, name: str | None, readers: Iterable[Any]) -> None:
    """Replace a LayerNorm by an RMSNorm with its gain, and move its bias behind its readers."""
    assert name is not None
    norm: Any = parent.get_submodule(name)
    for linear in readers:
        moved = linear.weight.data.double() @ norm.bias.data.double()
        if linear.bias is not None:
            moved = moved + linear.bias.data.double()
        linear.bias = nn.Parameter(moved.to(linear.weight.dtype), requires_grad=False)
    found = nn.RMSNorm(norm.weight.shape[0], norm.eps, device="meta")
    found.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
    parent.set_submodule(name, found)


def _read(model: PreTrainedModel) -> ModelMap:
    parallel: bool = model.config.use_parallel_residual
    for layer in _layers(model):
        _check_rope(layer.self_attn, model.get_submodule(NAMES.rope))
    found = read_decoder(model, replace(NAMES, mlp_norm=None) if parallel else NAMES)
    if model.config.qk_layernorm:
        found = replace(found, layers=tuple(_with_head_norms(layer) for layer in found.layers))
    if parallel:
        norms = tuple(_read_by_all(norm, found) for norm in found.norms)
        found = replace(found, norms=norms, inputs=tuple(map(_shared, found.inputs)))
    return found


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


def _read_by_all(norm: Norm, found: ModelMap) -> Norm:
    """Let the norm of a layer, if it is that, be read by the MLP too."""
    if norm.layer is None:
        return norm
    mlp = found.layers[norm.layer].mlp
    assert mlp is not None
    return replace(norm, readers=(*norm.readers, mlp.gate, mlp.up))


def _shared(input: Input) -> Input:
    """Let no scale of an input move into a norm that another input reads as well."""
    return replace(input, producer=None) if input.reads == "R1" else input


STABLELM = Family(_read, prepare=_prepare, no_stock=_NO_STOCK)
