"""Gemma: Llama's layers with norms of 1 + weight, scaled embeddings and a gate of tanh GELU.

Gemma 2 and 3 have norms behind both blocks as well. There R1 fails as it does for OLMo-2: a block
adds norm(y)·diag(g) to the stream, y what its last linear writes. That linear could write
y·diag(g) R1 instead, but the norm is to divide by the length of y, which then is nowhere: only an
R1 that mixes channels of one gain alone would pass. All else is possible. Norms before the blocks
fold into their linears, and scales of those inputs into them. R2, the rotation across heads and R4
act between linears. R3 stands behind RoPE, of which Gemma 3 has two, and norms of single heads:
scores are what they were, so that their soft caps do not miss it. Caps of logits stand behind the
head, where losses on its input must know of them, and the scale of embeddings before the stream.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.decoder import POST_NORM, read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap

_NAMES = replace(
    NAMES,
    mlp_norm="pre_feedforward_layernorm",
    behind_attention="post_attention_layernorm",
    behind_mlp="post_feedforward_layernorm",
)


def _prepare(model: PreTrainedModel) -> None:
    """Give the scale of embeddings its number, which no checkpoint holds: on any device."""
    embedding: Any = model.get_submodule(NAMES.embedding)
    embedding.embed_scale = torch.tensor(model.config.hidden_size**0.5)


def _read_first(model: PreTrainedModel) -> ModelMap:
    _check_causal(model)
    return read_decoder(model, NAMES, offset=1.0)


def _check_causal(model: PreTrainedModel) -> None:
    """Raise InputError for a config whose attention sees the next token."""
    if getattr(model.config, "use_bidirectional_attention", None):
        raise InputError(
            "use_bidirectional_attention=true lets tokens see those behind them, and no next token "
            "can be told from that: set it to false"
        )


def _read(model: PreTrainedModel) -> ModelMap:
    _check_causal(model)
    found = read_decoder(model, _NAMES, offset=1.0, cannot={"r1": POST_NORM})
    return replace(found, logit_cap=model.config.final_logit_softcapping)


def _read_capped(model: PreTrainedModel) -> ModelMap:
    found, cap = _read(model), model.config.attn_logit_softcapping
    return replace(found, layers=tuple(_with_cap(layer, cap) for layer in found.layers))


def _with_cap(layer: Layer, cap: float | None) -> Layer:
    return replace(layer, attention=replace(layer.attention, softcap=cap))


GEMMA = Family(_read_first, prepare=_prepare)
GEMMA2 = Family(_read_capped, prepare=_prepare, own_attention=True)
GEMMA3 = Family(_read, prepare=_prepare)  # whose stock attention has no caps, whatever they say
