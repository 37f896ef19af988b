"""LayerNorms as RMSNorms of a stream whose mean is zero, and layers with one norm for both blocks.

A LayerNorm is an RMSNorm of what has mean zero, times a gain, plus a bias (SliceGPT, arXiv
2401.15024). So what writes the stream writes it less its mean, LayerNorms become RMSNorms, and
their biases move through the linears that read them, the head among them.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families.names import Names, read_mlps
from spinlab.model.map import Input, ModelMap, Norm

NO_STOCK = "its LayerNorms would subtract the mean of a rotated stream, which the original has not"


def prepare_centred(model: PreTrainedModel, names: Names) -> None:
    """Make a stock model's LayerNorms RMSNorms, in place; every number is rounded once.

    A layer without `names.mlp_norm` has one norm for attention and MLP.
    """
    embedding: Any = model.get_submodule(names.embedding)
    head: Any = model.get_submodule(names.head)
    if head.weight is embedding.weight:  # the head reads what it did
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    _centre(embedding, 1)
    for layer in model.get_submodule(names.layers).children():
        routers, mlps = read_mlps(layer, names, model.config)
        for writer in (names.out, *(mlp.down for mlp in mlps)):
            _centre(layer.get_submodule(writer), 0)
        attention = names.queries, names.keys, names.values
        reading = (*routers, *(name for mlp in mlps for name in (mlp.gate, mlp.up)))
        if names.mlp_norm is None:
            attention, reading = (*attention, *reading), ()
        _to_rms(layer, names.attention_norm, map(layer.get_submodule, attention))
        if names.mlp_norm is not None:
            _to_rms(layer, names.mlp_norm, map(layer.get_submodule, reading))
    _to_rms(model, names.final_norm, [head])


def _centre(module: Any, dim: int) -> None:
    """Let the vectors along a dimension of a weight, which are added to the stream, have mean 0."""
    wide = module.weight.data.double()
    module.weight.data = (wide - wide.mean(dim, keepdim=True)).to(module.weight.dtype)
    if (bias := getattr(module, "bias", None)) is not None:
        wide = bias.data.double()
        bias.data = (wide - wide.mean()).to(bias.dtype)


def _to_rms(parent: nn.Module, name: str | None, readers: Iterable[Any]) -> None:
    """Replace a LayerNorm by an RMSNorm with its gain, and move its bias behind its readers."""
    assert name is not None
    norm: Any = parent.get_submodule(name)
    if (added := getattr(norm, "bias", None)) is not None:
        for linear in readers:
            moved = linear.weight.data.double() @ added.data.double()
            if linear.bias is not None:
                moved = moved + linear.bias.data.double()
            linear.bias = nn.Parameter(moved.to(linear.weight.dtype), requires_grad=False)
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    found = nn.RMSNorm(norm.weight.shape[0], epsilon, device="meta")
    found.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
    parent.set_submodule(name, found)


def with_shared_norms(found: ModelMap) -> ModelMap:
    """Say of a map that was read without norms before MLPs that those of attention are theirs.

    No scale of an input moves into a norm that another input reads as well.
    """
    norms = tuple(_read_by_all(norm, found) for norm in found.norms)
    return replace(found, norms=norms, inputs=tuple(map(_shared, found.inputs)))


def _read_by_all(norm: Norm, found: ModelMap) -> Norm:
    """Let the norm of a layer, if it is that, be read by the MLP too."""
    if norm.layer is None:
        return norm
    mlp = found.layers[norm.layer].mlp
    assert mlp is not None
    return replace(norm, readers=(*norm.readers, mlp.gate, mlp.up))


def _shared(input: Input) -> Input:
    return replace(input, producer=None) if input.reads == "R1" else input
