"""Seams: per model family, which linear reads and writes which rotated space.

This table is the only place that knows module names. A seam says what turns a linear's input
rows and output rows: `reads="R1"` means W ← W R1, `writes="R1"` means W ← R1ᵀ W.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.blocked import BLOCKED


@dataclass(frozen=True)
class Dimensions:
    """Hold the widths that rotations act on, and how many heads share them."""

    hidden: int
    head_dim: int
    intermediate: int
    layers: int
    heads: int  # that ask
    kv_heads: int  # that keys and values have; divides `heads`

    @property
    def widths(self) -> dict[str, int]:
        """Return the width that a group of linears reads."""
        heads = self.heads * self.head_dim
        of_stream = dict.fromkeys(("qkv", "gate_up"), self.hidden)
        return {**of_stream, "o": heads, "down": self.intermediate}

    @property
    def rows(self) -> dict[str, int]:
        """Return the width that a linear writes, by the last part of its name."""
        return {
            "q_proj": self.heads * self.head_dim,
            **dict.fromkeys(("k_proj", "v_proj"), self.kv_heads * self.head_dim),
            **dict.fromkeys(("gate_proj", "up_proj"), self.intermediate),
            **dict.fromkeys(("o_proj", "down_proj"), self.hidden),
        }


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
    """Name the parts of a model family. Seams stand in the order in which they are computed.

    A scale carrier's output rows multiply the input of a group, element by element, so a scale of
    that input can be moved into its rows. One row of v_proj feeds a channel of every query head
    that shares its key/value head.
    """

    seams: tuple[Seam, ...]
    norms: dict[str, str]  # norm of a layer that reads the stream -> group of linears behind it
    scale_carriers: dict[str, str]  # group -> linear whose rows scale that group's input
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # stock linear -> its parts
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"


def _seams(qkv: str, gate_up: str) -> tuple[Seam, ...]:
    """Return the seams of a decoder layer, given where its q, k, v and its gate, up linears are."""
    return (
        Seam(f"{qkv}.q_proj", "qkv", reads="R1", writes=None),
        Seam(f"{qkv}.k_proj", "qkv", reads="R1", writes=None),
        Seam(f"{qkv}.v_proj", "qkv", reads="R1", writes="R2"),
        Seam("self_attn.o_proj", "o", reads="R2", writes="R1"),
        Seam(f"{gate_up}.gate_proj", "gate_up", reads="R1", writes=None),
        Seam(f"{gate_up}.up_proj", "gate_up", reads="R1", writes=None),
        Seam("mlp.down_proj", "down", reads="R4", writes="R1"),
    )


# Mistral and Qwen took Llama's module names over. Qwen3's q_norm and k_norm stay as they are: they
# act on single heads, between linears that write no rotated space and R3. SmolLM3 turns the queries
# and keys of some layers by no RoPE, which R3 does not miss.
LLAMA = Family(
    seams=_seams("self_attn", "mlp"),
    norms={"input_layernorm": "qkv", "post_attention_layernorm": "gate_up"},
    scale_carriers={"o": "self_attn.v_proj", "down": "mlp.up_proj"},
)

# Fused linears are split when a model is loaded (`spinlab.model.split`); seams name the parts.
PHI3 = replace(
    LLAMA,
    seams=_seams("self_attn.qkv_proj", "mlp.gate_up_proj"),
    scale_carriers={"o": "self_attn.qkv_proj.v_proj", "down": "mlp.gate_up_proj.up_proj"},
    fused={
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    },
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "phi3": PHI3,
}


def family_of(model_type: str | None) -> Family:
    """Return the seam table of a transformers model type; raise InputError where there is none."""
    if model_type not in FAMILIES:
        reason = "has no seam table"
        if model_type in BLOCKED:
            reason = f"cannot be rotated, because {BLOCKED[model_type]}"
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model family {model_type!r} {reason}: supported are {known}")
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
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
    )


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers in order."""
    return list(model.get_submodule(family_of(model.config.model_type).layers).children())


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model between token ids and its head."""
    return model.get_submodule(family_of(model.config.model_type).layers.rpartition(".")[0])


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
