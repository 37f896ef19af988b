"""Phi-3.5-MoE: Mixtral's modules behind LayerNorms with biases, and a router of its own.

Its LayerNorms become RMSNorms when a model is loaded, and their biases move through the linears
that read them, the router among them. That router masks logits by how far they are below the
largest, and gives each of two experts the softmax of what is left: logits are what they were.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.centred import NO_STOCK, prepare_centred
from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.experts import split_all
from spinlab.model.families.llama import NAMES
from spinlab.model.map import Family, ModelMap

_NAMES = replace(NAMES, router="mlp.router.linear", experts="mlp.experts")


def _prepare(model: PreTrainedModel) -> None:
    split_all(model, _NAMES)
    prepare_centred(model, _NAMES)


def _read(model: PreTrainedModel) -> ModelMap:
    if (count := model.config.num_experts_per_tok) != 2:
        raise InputError(f"num_experts_per_tok={count}, and its router chooses two: set it to 2")
    return read_decoder(model, _NAMES)


PHIMOE = Family(_read, prepare=_prepare, no_stock=NO_STOCK)
