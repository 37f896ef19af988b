"""Mixtures of experts behind Llama's attention: Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral, GLM-4.5, ...

The router reads the normed stream, as all experts do: its weight takes R1, the norm's gain and the
scale of that input like theirs, and it sees its input unquantized, so that who is chosen changes
with the stream alone. So does the gate of a Qwen2-MoE's shared expert, a linear with one row. An
expert is a gated MLP with an R4 input of its own, and so is one that all tokens share, of which
GLM-4.5 has several in one. Some layers of these may have one gated MLP instead. OLMoE norms all
heads of queries, and of keys, together. Granite's numbers are those of `granite.py`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.experts import check_groups, join_all, split_all
from spinlab.model.families.llama import NAMES
from spinlab.model.families.names import Names
from spinlab.model.map import Family, ModelMap

_NAMES = replace(NAMES, router="mlp.gate.linear", experts="mlp.experts")
_QWEN2 = replace(_NAMES, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
_GLM4 = replace(_NAMES, shared="mlp.shared_experts")
_GRANITE = replace(
    NAMES, router="block_sparse_moe.router.linear", experts="block_sparse_moe.experts"
)


def _read_olmoe(model: PreTrainedModel) -> ModelMap:
    if (limit := model.config.clip_qkv) is not None:
        raise InputError(
            f"clip_qkv={limit} cuts values off channel by channel, which neither R2 nor a scale of "
            "what o_proj reads passes: only checkpoints with clip_qkv=null are taken"
        )
    return read_decoder(model, _NAMES)


def _read_granite(model: PreTrainedModel) -> ModelMap:
    return replace(read_decoder(model, _GRANITE), logit_divisor=float(model.config.logits_scaling))


def _read_glm4(model: PreTrainedModel) -> ModelMap:
    if model.config.first_k_dense_replace < model.config.num_hidden_layers:
        check_groups(model.config, least=2)
    return read_decoder(model, _GLM4)


def _family(names: Names, **changes: Any) -> Family:
    family = Family(
        partial(read_decoder, names=names),
        prepare=partial(split_all, names=names),
        restore=partial(join_all, names=names),
    )
    return replace(family, **changes)


QWEN2_MOE = _family(_QWEN2)
QWEN3_MOE = MIXTRAL = _family(_NAMES)
OLMOE = _family(_NAMES, read=_read_olmoe)
GLM4_MOE = _family(_GLM4, read=_read_glm4)
GRANITEMOE = _family(_GRANITE, read=_read_granite)
