"""Seams: per model family, which linear reads and writes which rotated space.

This table is the only place that knows module names. A seam says what turns a linear's input
rows and output rows: `reads="R1"` means W ← W R1, `writes="R1"` means W ← R1ᵀ W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import InputError


@dataclass(frozen=True)
class Dimensions:
    """Hold the widths that rotations act on."""

    hidden: int
    head_dim: int
    intermediate: int
    layers: int


@dataclass(frozen=True)
class Seam:
    """Place one linear of a decoder layer between the rotated spaces.

    `group` names the linears that read the very same input; they share its quantizer.
    """

    name: str
    group: str
    reads: str | None
    writes: str | None


@dataclass(frozen=True)
class Family:
    """Name the parts of a model family. Seams stand in the order in which they are computed."""

    seams: tuple[Seam, ...]
    norms: dict[str, str]  # norm of a layer -> group of linears that reads it
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"


LLAMA = Family(
    seams=(
        Seam("self_attn.q_proj", "qkv", reads="R1", writes=None),
        Seam("self_attn.k_proj", "qkv", reads="R1", writes=None),
        Seam("self_attn.v_proj", "qkv", reads="R1", writes="R2"),
        Seam("self_attn.o_proj", "o", reads="R2", writes="R1"),
        Seam("mlp.gate_proj", "gate_up", reads="R1", writes=None),
        Seam("mlp.up_proj", "gate_up", reads="R1", writes=None),
        Seam("mlp.down_proj", "down", reads="R4", writes="R1"),
    ),
    norms={"input_layernorm": "qkv", "post_attention_layernorm": "gate_up"},
)

FAMILIES: dict[str, Family] = {"llama": LLAMA}


def family_of(model_type: str | None) -> Family:
    """Return the seam table of a transformers model type; raise InputError for unknown ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model family {model_type!r} has no seam table: supported are {known}")
    return FAMILIES[model_type]


def dimensions_of(config: object) -> Dimensions:
    """Read the widths that rotations act on from a transformers config."""
    hidden: int = config.hidden_size  # type: ignore[attr-defined]
    heads: int = config.num_attention_heads  # type: ignore[attr-defined]
    return Dimensions(
        hidden=hidden,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=config.intermediate_size,  # type: ignore[attr-defined]
        layers=config.num_hidden_layers,  # type: ignore[attr-defined]
    )


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers in order."""
    return list(model.get_submodule(family_of(model.config.model_type).layers).children())


def linear_at(module: nn.Module, name: str) -> nn.Linear:
    """Return a submodule that has a weight: a linear, an embedding, a norm, or a twin of one."""
    return cast(nn.Linear, module.get_submodule(name))


def linears_of(model: PreTrainedModel) -> Iterator[tuple[str, int, Seam, nn.Linear]]:
    """Yield (full name, layer, seam, module) of every rotated linear, as they are computed."""
    family = family_of(model.config.model_type)
    for index, layer in enumerate(layers_of(model)):
        for seam in family.seams:
            yield (
                f"{family.layers}.{index}.{seam.name}",
                index,
                seam,
                linear_at(layer, seam.name),
            )
