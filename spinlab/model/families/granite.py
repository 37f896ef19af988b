"""Granite: Llama's modules, with numbers that multiply embeddings, blocks, scores and logits.

A number commutes with every rotation and every scale. Stock modules multiply by three of the four;
what divides the logits stands behind the head, where losses on its input must know of it.
"""

from dataclasses import replace

from transformers import PreTrainedModel

from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.llama import NAMES
from spinlab.model.map import Family, ModelMap


def _read(model: PreTrainedModel) -> ModelMap:
    return replace(read_decoder(model, NAMES), logit_divisor=float(model.config.logits_scaling))


GRANITE = Family(_read)
