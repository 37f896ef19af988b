"""Qwen3-MoE, OLMoE and Mixtral: Llama's attention, and MLPs that are routers and experts.

The router reads the normed stream, as all experts do: its weight takes R1, the norm's gain and the
scale of that input like theirs, and it sees its input unquantized, so that who is chosen changes
with the stream alone. An expert is a gated MLP with an R4 input of its own. Some layers of a
Qwen3-MoE may have one gated MLP instead. OLMoE norms all heads of queries, and of keys, together.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.experts import Experts, join_experts, split_experts
from spinlab.model.families.llama import NAMES
from spinlab.model.map import Family, ModelMap

_NAMES = replace(NAMES, router="mlp.gate.linear", experts="mlp.experts")


def _split_qwen3(model: PreTrainedModel) -> None:
    for block in _blocks(model):
        split_experts(block, normalized=block.gate.norm_topk_prob, rounded=True)


def _split_mixtral(model: PreTrainedModel) -> None:
    for block in _blocks(model):
        split_experts(block, normalized=True, rounded=False)


def _join(model: PreTrainedModel) -> None:
    for block in _blocks(model):
        if isinstance(block.experts, Experts):
            join_experts(block)


def _blocks(model: PreTrainedModel) -> list[Any]:
    """Return the MLPs that are mixtures, whose loss for balance, of training, is left out."""
    model.config.output_router_logits = False  # stock models look for stock routers to take it from
    layers: Any = model.get_submodule(NAMES.layers)
    return [layer.mlp for layer in layers if hasattr(layer.mlp, "experts")]


def _read_olmoe(model: PreTrainedModel) -> ModelMap:
    if (limit := model.config.clip_qkv) is not None:
        raise InputError(
            f"clip_qkv={limit} cuts values off channel by channel, which neither R2 nor a scale of "
            "what o_proj reads passes: only checkpoints with clip_qkv=null are taken"
        )
    return read_decoder(model, _NAMES)


_read = partial(read_decoder, names=_NAMES)
QWEN3_MOE = Family(_read, prepare=_split_qwen3, restore=_join)
OLMOE = Family(_read_olmoe, prepare=_split_qwen3, restore=_join)
MIXTRAL = Family(_read, prepare=_split_mixtral, restore=_join)
