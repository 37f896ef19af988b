"""Mixtures of experts as linears: transformers stacks the weights of a layer's experts.

Two modules take the place of a block's router and experts when a model is loaded. They compute what
stock ones do, in the order in which these do it, with one nn.Linear for each matrix of each expert,
so that everything that swaps, rotates or rounds linears works on them. An expert is called with its
own tokens, and not at all without any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spinlab.errors import InputError


class Router(nn.Module):
    """Choose experts for every token, by a softmax over what its linear gives.

    normalized: whether the weights of the chosen add up to one; rounded: whether they come in the
    dtype of the tokens. The softmax is taken in float32, as stock routers have it, or wider where
    the model is.
    """

    def __init__(self, stock: Any, normalized: bool, rounded: bool) -> None:
        super().__init__()
        self.linear = _linear(stock.weight.detach())
        self.top_k, self.normalized, self.rounded = stock.top_k, normalized, rounded
        self._stock = (_emptied(stock, "weight"),)  # in a tuple it is no module of this one

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return for x (tokens, hidden): logits (tokens, experts), weights, and who is chosen.

        Weights and experts are (tokens, top_k).
        """
        logits = self.linear(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, chosen = torch.topk(logits.softmax(-1, dtype=wide), self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype) if self.rounded else weights, chosen

    def stock(self) -> nn.Module:
        """Return the stock router with the weight as it stands."""
        (found,) = self._stock
        found.weight = _frozen(self.linear.weight.detach())
        return found


class Expert(nn.Module):
    """Compute down(activation(gate)·up)."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj = _linear(gate.clone()), _linear(up.clone())
        self.down_proj, self.act_fn = _linear(down.clone()), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (tokens, hidden) to the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Sum for every token what its experts give, each times its weight.

    only: the one expert that is computed, where others do not matter.
    """

    def __init__(self, stock: Any) -> None:
        pairs = zip(stock.gate_up_proj.detach(), stock.down_proj.detach(), strict=True)
        super().__init__(Expert(gate_up, down, stock.act_fn) for gate_up, down in pairs)
        self.only: int | None = None
        self._stock = (_emptied(stock, "gate_up_proj", "down_proj"),)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Map x (tokens, hidden) to the same shape; chosen and weights are (tokens, top_k)."""
        total = torch.zeros_like(x)
        for index in chosen.unique().tolist():  # in ascending order
            if self.only not in (None, index):
                continue
            token, place = torch.where(chosen == index)
            found = self[index](x[token]) * weights[token, place, None]
            total.index_add_(0, token, found.to(total.dtype))
        return total

    def stock(self) -> nn.Module:
        """Return the stock module with the weights as they stand, stacked."""
        (found,) = self._stock
        experts: list[Any] = list(self)
        pairs = [torch.cat((e.gate_proj.weight, e.up_proj.weight)).detach() for e in experts]
        found.gate_up_proj = _frozen(torch.stack(pairs))
        found.down_proj = _frozen(torch.stack([e.down_proj.weight.detach() for e in experts]))
        return found


def split_experts(block: Any, normalized: bool, rounded: bool) -> None:
    """Replace the router (`gate`) and the stacked experts of a stock block, in place.

    normalized, rounded: as `Router` has them. Raises InputError where a token would go to more
    experts than there are.
    """
    count = len(block.gate.weight)
    if not 1 <= block.gate.top_k <= count:
        raise InputError(
            f"num_experts_per_tok={block.gate.top_k} is not in 1 … {count}, the experts"
        )
    block.gate = Router(block.gate, normalized, rounded)
    block.experts = Experts(block.experts)


def join_experts(block: Any) -> None:
    """Undo `split_experts` with the weights as they stand."""
    block.gate, block.experts = block.gate.stock(), block.experts.stock()


@contextmanager
def alone(layer: nn.Module, linear: nn.Module) -> Iterator[None]:
    """Compute only the expert of a layer that a linear is part of; all for any other linear."""
    mixtures = [module for module in layer.modules() if isinstance(module, Experts)]
    for mixture in mixtures:
        parts = (list(expert.modules()) for expert in mixture)
        mixture.only = next((i for i, own in enumerate(parts) if linear in own), None)
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.only = None


def _emptied(stock: nn.Module, *names: str) -> Any:
    """Take the numbers of a stock module's parameters, whose shapes it keeps."""
    for name in names:
        setattr(stock, name, _frozen(getattr(stock, name).detach().to("meta")))
    return stock


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _linear(weight: torch.Tensor) -> nn.Linear:
    """Return a linear around a weight (out, in) without drawing one of its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _frozen(weight)
    return linear
