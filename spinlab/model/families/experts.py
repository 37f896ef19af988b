"""Mixtures of experts as linears: transformers stacks the weights of a layer's experts.

Two modules take the place of a block's router and experts when a model is loaded. They compute what
stock ones do, in the order in which these do it, with one nn.Linear for each matrix of each expert,
so that everything that swaps, rotates or rounds linears works on them. An expert is called with its
own tokens, and not at all without any.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.model.families.names import Names


class Router(nn.Module):
    """Choose experts for every token as a stock router does, whose one product is a linear's.

    What follows that product is the stock module's own: softmax or sigmoid, groups, corrections,
    and in which dtype. Its buffers stay under their names.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        bias = getattr(stock, "bias", None)
        self.linear = _RouterLinear(stock.weight.detach(), None if bias is None else bias.detach())
        self.top_k: int = stock.top_k
        self._buffers = stock._buffers  # one dict, so that the stock module's move with these
        emptied = _emptied(stock, "weight", *([] if bias is None else ["bias"]))
        self._stock = (emptied.eval(),)  # in a tuple it is no module of this one, nor told later

    def forward(self, x: torch.Tensor) -> Any:
        """Return what the stock router does for x (..., hidden)."""
        with _Product(self._multiplied, x):
            return self._stock[0](x)

    def _multiplied(self, x: torch.Tensor, asked: torch.dtype) -> torch.Tensor:
        """Return logits (tokens, experts), in the dtype that is asked for or that of x if wider."""
        return self.linear(x.flatten(0, -2).to(torch.promote_types(x.dtype, asked)))

    def stock(self) -> nn.Module:
        """Return the stock router with the weight as it stands."""
        (found,) = self._stock
        found.weight = _frozen(self.linear.weight.detach())
        if self.linear.bias is not None:
            found.bias = _frozen(self.linear.bias.detach())
        return found


class _RouterLinear(nn.Linear):
    """A linear around its weight that multiplies in the dtype of what it is given.

    Some stock routers do so in float32, whatever the dtype of the model.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = _frozen(weight)
        if bias is not None:
            self.bias = _frozen(bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class _Product(TorchFunctionMode):
    """Within it, the product of a linear with its input is another one, of x."""

    def __init__(
        self, product: Callable[[torch.Tensor, torch.dtype], torch.Tensor], x: torch.Tensor
    ) -> None:
        super().__init__()
        self._product, self._x = product, x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return self._product(self._x, args[0].dtype)
        return func(*args, **(kwargs or {}))


class Expert(nn.Module):
    """Compute down(activation(gate)·up)."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, stock: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn: nn.Module = stock.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (tokens, hidden) to the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scored(nn.Module):
    """Multiply the tokens of an expert by their weights before it reads them.

    It is a module so that learning can tell what it reads, which no score has multiplied.
    """

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the product of x (tokens, hidden) and weights (tokens, 1)."""
        return x * weights


class Experts(nn.ModuleList):
    """Sum for every token what its experts give, each times its weight.

    only: the one expert that is computed, where others do not matter.
    """

    names = ("gate_up_proj", "down_proj")  # what the stock module stacks

    def __init__(self, stock: Any) -> None:
        super().__init__(self.taken_apart(stock))
        self.only: int | None = None
        self._stock = (_emptied(stock, *self.names),)

    def taken_apart(self, stock: Any) -> Iterator[Expert]:
        """Yield the experts of a stock module."""
        pairs = zip(stock.gate_up_proj.detach(), stock.down_proj.detach(), strict=True)
        for gate_up, down in pairs:
            gate, up = gate_up.chunk(2)
            yield Expert(linear_of(gate), linear_of(up), linear_of(down), stock)

    def stacked(self) -> dict[str, torch.Tensor]:
        """Return what the stock module stacks, by `names`."""
        experts: list[Any] = list(self)
        pairs = [torch.cat((e.gate_proj.weight, e.up_proj.weight)).detach() for e in experts]
        downs = [e.down_proj.weight.detach() for e in experts]
        return {"gate_up_proj": torch.stack(pairs), "down_proj": torch.stack(downs)}

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Map x (tokens, hidden) to the same shape; chosen and weights are (tokens, top_k)."""
        total = torch.zeros_like(x)
        for index in chosen.unique().tolist():  # in ascending order
            if self.only not in (None, index):
                continue
            token, place = torch.where(chosen == index)
            found = self.weighted(self[index], x[token], weights[token, place, None])
            total.index_add_(0, token, found.to(total.dtype))
        return total

    def weighted(self, expert: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what an expert adds for x (tokens, hidden); weights: (tokens, 1)."""
        return expert(x) * weights

    def stock(self) -> nn.Module:
        """Return the stock module with the weights as they stand, stacked."""
        (found,) = self._stock
        for name, stack in self.stacked().items():
            setattr(found, name, _frozen(stack))
        return found


def mixtures_of(model: PreTrainedModel, names: Names) -> list[tuple[Any, str]]:
    """Return the blocks of a model that are mixtures, and what they call their routers.

    Their loss for balance, of training, is left out: stock models look for stock routers for it.
    """
    model.config.output_router_logits = False
    assert names.router is not None
    mlp, router, _ = names.router.split(".")
    layers: Any = model.get_submodule(names.layers)
    blocks = (getattr(layer, mlp) for layer in layers)
    return [(block, router) for block in blocks if hasattr(block, "experts")]


def split_all(model: PreTrainedModel, names: Names, kind: type[Experts] = Experts) -> None:
    """Do `split_experts` to every mixture of a stock model, in place."""
    for block, router in mixtures_of(model, names):
        split_experts(block, router, kind)


def join_all(model: PreTrainedModel, names: Names) -> None:
    """Undo `split_all` with the weights as they stand."""
    for block, router in mixtures_of(model, names):
        join_experts(block, router)


def split_experts(block: Any, router: str = "gate", kind: type[Experts] = Experts) -> None:
    """Replace the router and the stacked experts of a stock block, in place.

    kind: how they are stacked. Raises InputError where a token would go to more experts than there
    are.
    """
    stock = getattr(block, router)
    count = len(stock.weight)
    if not 1 <= stock.top_k <= count:
        raise InputError(f"num_experts_per_tok={stock.top_k} is not in 1 … {count}, the experts")
    setattr(block, router, Router(stock))
    block.experts = kind(block.experts)


def join_experts(block: Any, router: str = "gate") -> None:
    """Undo `split_experts` with the weights as they stand; of a stock block nothing is to be done.

    Its shared experts are linears already.
    """
    if isinstance(block.experts, Experts):
        setattr(block, router, getattr(block, router).stock())
        block.experts = block.experts.stock()


def check_groups(config: Any, least: int = 1) -> None:
    """Raise InputError where experts of a config cannot be chosen from its best groups.

    least: experts of a group whose scores add up to that of the group.
    """
    count, top_k = config.n_routed_experts, config.num_experts_per_tok
    groups, chosen = config.n_group, config.topk_group
    if not groups or count % groups or count // groups < least:
        raise InputError(f"n_group={groups} does not cut {count} experts into groups of {least} on")
    if not 1 <= (chosen or 0) <= groups or top_k > chosen * (count // groups):
        raise InputError(
            f"topk_group={chosen} of {groups} groups do not hold num_experts_per_tok={top_k}"
        )


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


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """Return a linear around a weight (out, in) without drawing one of its own.

    Rows that lie together stay where they are: a copy would be there beside a whole layer's.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)  # its own draws, on "meta" too: most of what many experts took
    linear.out_features, linear.in_features = weight.shape
    for name, tensor in (("weight", weight), ("bias", bias)):
        linear.register_parameter(name, None if tensor is None else _frozen(tensor.contiguous()))
    return linear


def _emptied(stock: nn.Module, *names: str) -> Any:
    """Take the numbers of a stock module's parameters, whose shapes it keeps."""
    for name in names:
        setattr(stock, name, _frozen(getattr(stock, name).detach().to("meta")))
    return stock


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
