"""Llama 4's text model: dense MLPs and mixtures in turn, and attention that sees chunks of a text.

An expert reads a token times its score, a sigmoid of the router's logit, so that what is quantized
is the product. That number commutes with every rotation and every scale. An expert that all tokens
go to stands beside. Behind RoPE, which turns neighbours, queries and keys are divided by their
lengths, without gains: R3 stands behind. Layers without RoPE multiply queries by a number that
grows with their position, and see all of a text; the others see no token before the chunk of
`attention_chunk_size` that a token is in.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.experts import (
    Expert,
    Experts,
    Scored,
    join_experts,
    linear_of,
    mixtures_of,
    split_experts,
)
from spinlab.model.families.llama import NAMES
from spinlab.model.layer import Layer
from spinlab.model.map import Family, ModelMap

_NAMES = replace(
    NAMES,
    mlp="feed_forward",
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
    router="feed_forward.router.linear",
    experts="feed_forward.experts",
    shared="feed_forward.shared_expert",
)


class _Expert(Expert):
    """An expert whose tokens come times their scores."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.scored = Scored()

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map x (tokens, hidden), with scores (tokens, 1), to the same shape."""
        return super().forward(self.scored(x, scores))


class _Experts(Experts):
    """Experts whose stacked weights are (in, out)."""

    def taken_apart(self, stock: Any) -> Any:
        pairs = zip(stock.gate_up_proj.detach(), stock.down_proj.detach(), strict=True)
        for gate_up, down in pairs:
            gate, up = gate_up.mT.chunk(2)
            yield _Expert(linear_of(gate), linear_of(up), linear_of(down.mT), stock)

    def stacked(self) -> dict[str, torch.Tensor]:
        return {name: x.mT.contiguous() for name, x in super().stacked().items()}

    def weighted(self, expert: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return expert(x, weights)


class _Mixture(nn.Module):
    """Add what a token's experts give to what the shared one does.

    The stock module gives every expert every token, times a score that is 0 for most.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        split_experts(stock, "router", _Experts)
        self.router, self.experts = stock.router, stock.experts
        self.shared_expert = stock.shared_expert
        self._stock = (stock,)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for x (..., hidden) what is added to the stream, (tokens, hidden), and logits."""
        x = x.flatten(0, -2)
        scores, logits = self.router(x)
        chosen = torch.topk(logits, self.router.top_k, dim=1).indices
        added = self.experts(x, chosen, scores.gather(1, chosen))
        return self.shared_expert(x) + added, logits

    def stock(self) -> nn.Module:
        """Return the stock module with the weights as they stand."""
        (found,) = self._stock
        for name in ("router", "experts", "shared_expert"):
            setattr(found, name, getattr(self, name))
        join_experts(found, "router")
        return found


def _split(model: PreTrainedModel) -> None:
    for layer in _mixed(model):
        layer.feed_forward = _Mixture(layer.feed_forward)


def _join(model: PreTrainedModel) -> None:
    for layer in _mixed(model):
        if isinstance(layer.feed_forward, _Mixture):
            layer.feed_forward = layer.feed_forward.stock()


def _mixed(model: PreTrainedModel) -> list[Any]:
    """Return the layers that have a mixture."""
    mixtures = [block for block, _ in mixtures_of(model, _NAMES)]
    layers: Any = model.get_submodule(NAMES.layers)
    return [layer for layer in layers if layer.feed_forward in mixtures]


def _read(model: PreTrainedModel) -> ModelMap:
    found = read_decoder(model, _NAMES)
    return replace(found, layers=tuple(_reaching(model, layer) for layer in found.layers))


def _reaching(model: PreTrainedModel, layer: Layer) -> Layer:
    """Say how a layer turns its heads, and how far back the last token of a chunk looks."""
    stock: Any = model.get_submodule(layer.attention.path)
    chunked = model.config.layer_types[stock.layer_idx] == "chunked_attention"
    window = model.config.attention_chunk_size if chunked else None
    changed = replace(layer.attention, neighbours=True, key_bias=False, window=window)
    return replace(layer, attention=changed)


LLAMA4 = Family(_read, prepare=_split, restore=_join)
