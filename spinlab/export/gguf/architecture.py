"""What llama.cpp calls a family, and what its graph of that name computes: the rest is refused.

As read in src/models of llama.cpp 0.5.0, which is in llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.layer import Layer
from spinlab.model.map import ModelMap
from spinlab.model.modules import head_of, linear_at, map_of

_QKV = ("queries", "keys", "values")
_ROPES = ("default", "linear", "yarn")
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what its graphs take for granted


@dataclass(frozen=True)
class Architecture:
    """Say what a graph of llama.cpp is called, and which models it computes.

    neighbours: RoPE turns numbers 2i and 2i+1 of a head together, not i and i + width/2, so that
    rows of queries and keys change places. joined: q, k and v lie in one tensor, gate and up in
    another. wide_heads: heads need not make up the stream's width. partial: RoPE may turn a part
    of a head. biases: of which linears. ropes: kinds of RoPE; with other frequencies than powers of
    the base they lie in the file. unturned: every how many layers one has no RoPE.
    """

    name: str
    neighbours: bool = False
    joined: bool = False
    wide_heads: bool = False
    partial: bool = False
    biases: tuple[str, ...] = ()
    ropes: tuple[str, ...] = _ROPES
    factors: bool = False
    unturned: int = 0


_LLAMA = Architecture(
    "llama",
    neighbours=True,
    wide_heads=True,
    biases=(*_QKV, "out", "gate", "up", "down"),
    ropes=(*_ROPES, "llama3"),
    factors=True,
)
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", biases=_QKV),
    "qwen3": Architecture("qwen3", wide_heads=True, biases=_QKV),
    "smollm3": Architecture("smollm3", neighbours=True, wide_heads=True, biases=_QKV, unturned=4),
    "phi3": Architecture("phi3", joined=True, partial=True),
}


def architecture_of(model_map: ModelMap) -> Architecture | None:
    """Return what llama.cpp has for a family."""
    return _ARCHITECTURES.get(model_map.family)


@dataclass(frozen=True)
class Described:
    """Hold a model's architecture and its settings, by their keys without the architecture's."""

    architecture: Architecture
    settings: dict[str, int | float | str] = field(default_factory=dict)

    def add(self, writer: gguf.GGUFWriter) -> None:
        """Put them into a file."""
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in self.settings.items():
            kinds[type(value)](f"{self.architecture.name}.{key}", value)


def describe(setting: str, model: PreTrainedModel) -> Described:
    """Describe a model, whose numbers may be on the meta device.

    Raises InputError where llama.cpp does not compute its function.
    """
    model_map = map_of(model)
    architecture = architecture_of(model_map)
    if architecture is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise InputError(
            f"{setting}: the family {model_map.family!r} has no place in it: it holds {known}"
        )
    for fault in _faults(architecture, model, model_map):
        raise InputError(
            f"{setting}: llama.cpp's {architecture.name} has no {fault}, which this model has: use "
            "export.checkpoint"
        )
    return Described(architecture, {**_sizes(model, model_map), **_rope(architecture, model)})


def rope_factors(architecture: Architecture, model: PreTrainedModel) -> torch.Tensor | None:
    """Return what divides the frequencies of plain RoPE: (turned width / 2,) float32.

    None where they are plain, or follow from the settings.
    """
    if not architecture.factors or map_of(model).rope_kind in ("default", "linear"):
        return None
    frequencies = _rope_module(model).inv_freq.double().cpu()
    steps = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    return (_base(model) ** -steps / frequencies).float()


def _faults(
    architecture: Architecture, model: PreTrainedModel, model_map: ModelMap
) -> Iterator[str]:
    """Yield what a model has and a graph does not compute."""
    layers, widths = model_map.layers, model_map.dimensions
    turned, head = _turned(model), widths.head_dim
    shapes = {(a.heads, a.kv_heads, a.head_dim) for a in (layer.attention for layer in layers)}
    if len(shapes) > 1 or len({norm.epsilon for norm in model_map.norms}) > 1:
        yield "layers that differ"
    for index, layer in enumerate(layers):
        if layer.mlp is None or not layer.mlp.by_silu:
            yield f"MLP like that of {layer.path}"
        for name, path in _linears(layer):
            if name not in architecture.biases and linear_at(model, path).bias is not None:
                yield f"bias of {path}"
        every = architecture.unturned
        unturned = every > 0 and (index + 1) % every == 0
        if layer.attention.rope == unturned:
            yield f"RoPE like that of {layer.path}"
    if head_of(model).bias is not None:
        yield f"bias of {model_map.head}"
    if not architecture.wide_heads and widths.heads * head != model_map.hidden:
        yield f"{widths.heads} heads of {head} numbers in a stream of {model_map.hidden}"
    if turned != head and not architecture.partial:
        yield f"RoPE on {turned} of {head} numbers of a head"
    if model_map.rope_kind not in architecture.ropes:
        yield f"RoPE of the kind {model_map.rope_kind}"
    if model_map.rope_kind == "yarn" and not architecture.factors:
        said = model.config.rope_parameters
        for name in (n for n, value in _YARN.items() if said.get(n) not in (None, value)):
            yield f"RoPE of the kind yarn with {name}={said[name]}"


def _linears(layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield the name and path of every linear of a layer."""
    for part in (layer.attention, layer.mlp):
        for name in (*_QKV, "out", "gate", "up", "down"):
            if hasattr(part, name):
                yield name, getattr(part, name)


def _sizes(model: PreTrainedModel, model_map: ModelMap) -> dict[str, int | float | str]:
    """Return widths and counts.

    No graph has windows: a text may be as long as the smallest one, up to which they are the same.
    """
    widths, config = model_map.dimensions, model.config
    windows = [a.window for a in (layer.attention for layer in model_map.layers) if a.window]
    return {
        "context_length": min([config.max_position_embeddings, *windows]),
        "embedding_length": model_map.hidden,
        "block_count": widths.layers,
        "feed_forward_length": widths.intermediate,
        "attention.head_count": widths.heads,
        "attention.head_count_kv": widths.kv_heads,
        "attention.key_length": widths.head_dim,
        "attention.value_length": widths.head_dim,
        "attention.layer_norm_rms_epsilon": float(model_map.norms[-1].epsilon),
        "vocab_size": config.vocab_size,
    }


def _rope(architecture: Architecture, model: PreTrainedModel) -> dict[str, int | float | str]:
    """Return what RoPE is but for the factors of single frequencies.

    Where its settings say YaRN, llama.cpp makes queries and keys longer by itself.
    """
    kind, said = map_of(model).rope_kind, model.config.rope_parameters
    length = float(getattr(_rope_module(model), "attention_scaling", 1.0))
    found: dict[str, int | float | str] = {
        "rope.dimension_count": _turned(model),
        "rope.freq_base": float(_base(model)),
    }
    if kind in ("linear", "yarn") and not (kind == "yarn" and architecture.factors):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(said["factor"])}
    if kind == "yarn" and not architecture.factors:
        found["rope.scaling.original_context_length"] = said["original_max_position_embeddings"]
        length /= 1 + 0.1 * math.log(said["factor"])
    return found if length == 1 else {**found, "rope.scaling.attn_factor": length}


def _rope_module(model: PreTrainedModel) -> Any:
    """Return what holds the frequencies: `inv_freq`, (turned width / 2,)."""
    return model.get_submodule(map_of(model).rope)


def _turned(model: PreTrainedModel) -> int:
    """Return how many numbers of a head RoPE turns."""
    return 2 * _rope_module(model).inv_freq.shape[0]


def _base(model: PreTrainedModel) -> float:
    """Return the base whose powers the frequencies of plain RoPE are."""
    return model.config.rope_parameters["rope_theta"]
