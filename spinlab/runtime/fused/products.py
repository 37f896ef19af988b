"""What linears that share an input multiply it with: one stack of packed weights, or each its own.

The readers in `spinlab.runtime.fused.modules` prepare the input; a product only multiplies.
"""

from collections.abc import Sequence

import torch
from torch import nn

from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.formats import PackedWeight, TokenLevels


class PackedProduct(nn.Module):
    """Multiply by 4-bit weights that are stacked along their outputs."""

    def __init__(
        self, weight: PackedWeight, bias: torch.Tensor | None, operations: Operations
    ) -> None:
        super().__init__()
        self.operations, self.chunk = operations, weight.chunk
        self.out_features = weight.out_features
        self.packed, self.scale = nn.Buffer(weight.packed), nn.Buffer(weight.scale)
        self.zero = None if weight.zero is None else nn.Buffer(weight.zero)
        self.sums = nn.Buffer(weight.sums)
        self.bias = None if bias is None else nn.Buffer(bias)

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.packed, self.scale, self.zero, self.sums, self.chunk)

    def needs_sums(self, quantizer: TokenQuantizer) -> bool:
        """Tell whether sums of levels are multiplied, as a quantizer makes them.

        By zero points of weights; of finer groups than its own the product makes them itself.
        """
        width = 2 * self.packed.shape[1]
        groups = width // (quantizer.group_size or width)
        return self.zero is not None and self.sums.shape[1] == groups

    def of_levels(
        self, inputs: TokenLevels, dtype: torch.dtype, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs (tokens, out) for quantized inputs, added to others if given."""
        return self.operations.linear(inputs, self.weight, self.bias, dtype, added)

    def of_floats(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Return the same for inputs (tokens, in) that stay floats."""
        return self.operations.linear16(x, self.weight, self.bias, added)


class SeparateProducts(nn.Module):
    """Multiply by each linear of a group on its own: twins that prepare their input themselves."""

    def __init__(self, twins: Sequence[nn.Module]) -> None:
        super().__init__()
        self.twins = nn.ModuleList(twins)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs side by side, (..., out), for the floats x: (..., in)."""
        found = [twin(x) for twin in self.twins]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def stack(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Return packed weights as one, rows below rows; None where their forms differ."""
    first = weights[0]
    forms = {(w.chunk, w.groups, w.blocks, w.zero is None, w.in_features) for w in weights}
    if len(forms) > 1:
        return None
    zeros = [w.zero for w in weights if w.zero is not None]
    return PackedWeight(
        packed=torch.cat([w.packed for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zero=torch.cat(zeros) if zeros else None,
        sums=torch.cat([w.sums for w in weights]),
        chunk=first.chunk,
    )
