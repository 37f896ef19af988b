"""Phi-3: Llama's layers with q, k, v in one linear and gate, up in another.

The two are split when a model is loaded, and the parts stand under the names of the linears that
they were.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.map import Family
from spinlab.model.split import join, split

_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
_NAMES = replace(
    NAMES,
    queries=f"{_QKV}.q_proj",
    keys=f"{_QKV}.k_proj",
    values=f"{_QKV}.v_proj",
    gate=f"{_GATE_UP}.gate_proj",
    up=f"{_GATE_UP}.up_proj",
    adds=True,  # its dropouts are of training
)


def _split(model: PreTrainedModel) -> None:
    """Replace every fused linear by its parts, in place."""
    for layer in _layers(model):
        attention, config = layer.self_attn, layer.self_attn.config
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        heads = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        rows = {name: count * attention.head_dim for name, count in heads.items()}
        split(layer, _QKV, rows)
        split(layer, _GATE_UP, dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size))


def _join(model: PreTrainedModel) -> None:
    """Undo `_split`."""
    for layer in _layers(model):
        join(layer, _QKV)
        join(layer, _GATE_UP)


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(model.get_submodule(NAMES.layers).children())


PHI3 = Family(partial(read_decoder, names=_NAMES), prepare=_split, restore=_join)
