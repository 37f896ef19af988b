"""Split fused linears (Phi-3's qkv_proj, gate_up_proj) into parts that seams can name, and rejoin.

The parts are plain nn.Linears under the fused linear's name, so the stock forward pass is not
touched and everything that swaps or rotates linears works on them.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.seams import dimensions_of, family_of, layers_of, linear_at


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

    def parts(self) -> list[nn.Linear]:
        """Return the parts in the order of their rows."""
        return [linear_at(self, name) for name in self.names]


def split_fused(model: PreTrainedModel) -> None:
    """Replace every fused linear of a stock model by its parts, in place."""
    rows = dimensions_of(model.config).rows
    for layer in layers_of(model):
        for name, parts in family_of(model.config.model_type).fused.items():
            split = _split(linear_at(layer, name), {part: rows[part] for part in parts})
            layer.set_submodule(name, split)


def join_fused(model: PreTrainedModel) -> None:
    """Undo `split_fused` in place, so that the model saves as a stock checkpoint."""
    for layer in layers_of(model):
        for name in family_of(model.config.model_type).fused:
            split = layer.get_submodule(name)
            assert isinstance(split, SplitLinear), f"{name} is not split"
            layer.set_submodule(name, _join(split.parts()))


def _split(linear: nn.Linear, rows: dict[str, int]) -> SplitLinear:
    """Cut the rows of a linear into named parts that share no memory with it."""
    weights = linear.weight.detach().split(list(rows.values()))
    biases = [None] * len(rows)
    if linear.bias is not None:
        biases = linear.bias.detach().split(list(rows.values()))
    parts = zip(rows, weights, biases, strict=True)
    return SplitLinear({name: _linear(weight.clone(), bias) for name, weight, bias in parts})


def _join(parts: list[nn.Linear]) -> nn.Linear:
    """Stack the rows of linears that read the same input; all of them have a bias, or none."""
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    return _linear(torch.cat([part.weight.detach() for part in parts]), bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear around these tensors without drawing weights of its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
