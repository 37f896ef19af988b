"""Split linears that a family has fused (Phi-3's q, k, v) into parts with names, and rejoin them.

The parts are plain nn.Linears under the fused linear's name, so the stock forward pass is not
touched and everything that swaps or rotates linears works on them.
"""

from typing import cast

import torch
from torch import nn


class SplitLinear(nn.Module):
    """Stand for one linear by named parts: their outputs, in the order given, are its output."""

    def __init__(self, parts: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        return torch.cat([part(x) for part in self.parts()], dim=-1)

    def parts(self) -> list[nn.Module]:
        """Return the parts, or what stands for them, in the order of their rows."""
        return [self.get_submodule(name) for name in self.names]


def split(layer: nn.Module, name: str, rows: dict[str, int]) -> None:
    """Replace a linear of a layer by parts with so many rows, which share no memory with it."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is no linear"
    weights = linear.weight.detach().split(list(rows.values()))
    biases = [None] * len(rows)
    if linear.bias is not None:
        biases = linear.bias.detach().split(list(rows.values()))
    parts = zip(rows, weights, biases, strict=True)
    made = {part: _linear(weight.clone(), bias) for part, weight, bias in parts}
    layer.set_submodule(name, SplitLinear(made))


def join(layer: nn.Module, name: str) -> None:
    """Undo `split`: stack the rows of the parts; all of them have a bias, or none."""
    whole = layer.get_submodule(name)
    assert isinstance(whole, SplitLinear), f"{name} is not split"
    parts = cast(list[nn.Linear], whole.parts())
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    layer.set_submodule(name, _linear(torch.cat([p.weight.detach() for p in parts]), bias))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear around these tensors without drawing weights of its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
