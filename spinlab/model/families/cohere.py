"""Cohere (Command R): Llama's linears, both blocks behind one LayerNorm, and scaled logits.

The LayerNorms become RMSNorms when a model is loaded. Norms of queries and keys stay LayerNorms, as
StableLM's do. RoPE turns neighbours in a head, before R3, which does not miss the difference; a
bias of keys goes through the cache's codec with them.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from spinlab.model.families.centred import NO_STOCK, prepare_centred, with_shared_norms
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap

_NAMES = replace(NAMES, mlp_norm=None, query_norm="none", key_norm="none")


def _prepare(model: PreTrainedModel) -> None:
    prepare_centred(model, _NAMES)


def _read(model: PreTrainedModel) -> ModelMap:
    found = with_shared_norms(read_decoder(model, _NAMES))
    norms = bool(model.config.use_qk_norm)
    layers = tuple(_as_it_turns(layer, norms) for layer in found.layers)
    return replace(found, layers=layers, logit_divisor=1 / model.config.logit_scale)


def _as_it_turns(layer: Layer, norms: bool) -> Layer:
    """Say what queries and keys go through behind their linears."""
    path = layer.attention.path
    there = {"query_norm": f"{path}.q_norm", "key_norm": f"{path}.k_norm"} if norms else {}
    changed = {"neighbours": True, "key_bias": False, **there}
    return replace(layer, attention=replace(layer.attention, **changed))


COHERE = Family(_read, prepare=_prepare, no_stock=NO_STOCK)
