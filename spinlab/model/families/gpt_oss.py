"""GPT-OSS: a mixture with biases in every linear, and attention with sinks.

A sink is a learned score of a head that joins the softmax and has no value: scores are what they
were under every rotation. An expert gives down((up + 1)·glu(gate)), gate and up cut off at a
limit, so that no scale of what down reads moves into up; R4 stands between as elsewhere, and down
of an expert adds its bias before the token's weight. RoPE gives cosines and sines of pairs once.
Layers that slide stand in turn with those that see everything.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.experts import Experts, join_all, linear_of, split_all
from spinlab.model.families.llama import NAMES
from spinlab.model.layer import Layer
from spinlab.model.map import Family, Input, ModelMap

_NAMES = replace(NAMES, router="mlp.router.linear", experts="mlp.experts")


class _Expert(nn.Module):
    """Compute down((up + 1)·gate·sigmoid(alpha·gate)), with gate and up cut off at a limit."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, stock: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.alpha: float = stock.alpha
        self.limit: float = stock.limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (tokens, hidden) to the same shape."""
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(min=-self.limit, max=self.limit)
        return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))


class _Experts(Experts):
    """Experts whose stacked weights are (in, out), the columns of gate and up in turn."""

    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

    def taken_apart(self, stock: Any) -> Iterator[Any]:
        stacks = (getattr(stock, name).detach() for name in self.names)
        for gate_up, gate_up_bias, down, down_bias in zip(*stacks, strict=True):
            gate, up = (
                linear_of(gate_up[:, start::2].mT, gate_up_bias[start::2]) for start in (0, 1)
            )
            yield _Expert(gate, up, linear_of(down.mT, down_bias), stock)

    def stacked(self) -> dict[str, torch.Tensor]:
        experts: list[Any] = list(self)
        pairs = [(e.gate_proj, e.up_proj) for e in experts]
        weights = [torch.stack((gate.weight, up.weight), 1).flatten(0, 1) for gate, up in pairs]
        biases = [torch.stack((gate.bias, up.bias), 1).flatten() for gate, up in pairs]
        return {
            "gate_up_proj": torch.stack(weights).detach().mT.contiguous(),
            "gate_up_proj_bias": torch.stack(biases).detach(),
            "down_proj": torch.stack([e.down_proj.weight.mT for e in experts]).detach(),
            "down_proj_bias": torch.stack([e.down_proj.bias for e in experts]).detach(),
        }


def _read(model: PreTrainedModel) -> ModelMap:
    found = read_decoder(model, _NAMES)
    inputs = tuple(map(_without_producer, found.inputs))
    layers = tuple(map(_with_sinks, found.layers))
    return replace(found, inputs=inputs, layers=layers, rope_once=True)


def _without_producer(input: Input) -> Input:
    """Say that no scale of what down reads can move into up."""
    return replace(input, producer=None) if input.reads == "R4" else input


def _with_sinks(layer: Layer) -> Layer:
    return replace(layer, attention=replace(layer.attention, sinks=True))


GPT_OSS = Family(
    _read,
    prepare=partial(split_all, names=_NAMES, kind=_Experts),
    restore=partial(join_all, names=_NAMES),
    own_attention=True,
)
