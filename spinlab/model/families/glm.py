"""GLM and GLM-4: Llama's attention, gate and up in one linear; GLM-4 with norms behind blocks too.

The fused linear is split when a model is loaded, as Phi-3's is. RoPE turns neighbours in the first
half of a head, before R3, which does not miss the difference; a bias of keys goes through the
cache's codec with them. GLM-4's norms behind its blocks leave no R1, as in OLMo-2.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from spinlab.model.families.decoder import POST_NORM, read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.families.names import Names
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap
from spinlab.model.split import join, split

_GATE_UP = "mlp.gate_up_proj"
_GLM = replace(NAMES, gate=f"{_GATE_UP}.gate_proj", up=f"{_GATE_UP}.up_proj")
_GLM4 = replace(_GLM, behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm")


def _split(model: PreTrainedModel) -> None:
    width = model.config.intermediate_size
    for layer in _layers(model):
        split(layer, _GATE_UP, dict.fromkeys(("gate_proj", "up_proj"), width))


def _join(model: PreTrainedModel) -> None:
    for layer in _layers(model):
        join(layer, _GATE_UP)


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(model.get_submodule(NAMES.layers).children())


def _read(model: PreTrainedModel, names: Names, cannot: dict[str, str]) -> ModelMap:
    found = read_decoder(model, names, cannot=cannot)
    return replace(found, layers=tuple(map(_turning, found.layers)))


def _turning(layer: Layer) -> Layer:
    """Say how RoPE turns queries and keys."""
    return replace(layer, attention=replace(layer.attention, neighbours=True, key_bias=False))


GLM = Family(partial(_read, names=_GLM, cannot={}), prepare=_split, restore=_join)
GLM4 = Family(partial(_read, names=_GLM4, cannot={"r1": POST_NORM}), prepare=_split, restore=_join)
