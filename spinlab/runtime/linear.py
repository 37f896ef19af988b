"""A linear that quantizes its input per token, multiplies integers exactly, and rescales.

With activation level a, scale s, zero z and weight level w, scale t, zero u, per group of inputs:

    y = Σ s(a - z)·t(w - u) = s·t·(Σ a·w - z Σ w - u Σ a + g·z·u)

The four sums are integers; the floats enter once per group and output.
"""

import torch
from torch import nn

from spinlab.quant.inputs import Encoded, InputPath
from spinlab.runtime.kernels import Matmul
from spinlab.weights.quantized import QuantizedWeight


class IntegerLinear(nn.Module):
    """Run y = x Wᵀ + bias on integers. Weights rest as int8 levels, one byte each.

    Weights and activations may be grouped along the input; the finer grouping must refine the
    coarser one.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        path: InputPath,
        matmul: Matmul,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert weight.grid.bits <= 8, "integer kernels take weights of at most 8 bits"
        # an asymmetric 8-bit grid reaches 255: shift levels and zero points into int8
        shift = 0 if weight.grid.symmetric or weight.grid.bits < 8 else 128
        levels = (weight.levels - shift).to(torch.int8)
        self.path, self.matmul, self.dtype = path, matmul, dtype
        self.scale = nn.Buffer(weight.scale.to(dtype))
        self.zero = nn.Buffer((weight.zero - shift).to(dtype))
        self.symmetric = weight.grid.symmetric
        self.bias = None if bias is None else nn.Buffer(bias.to(dtype))
        self.in_features, self.out_features = levels.shape[1], levels.shape[0]
        quantizer = path.quantizer
        input_group = (quantizer.group_size if quantizer else 0) or self.in_features
        self.block = min(input_group, self.in_features // weight.groups)
        assert input_group % self.block == 0, "the groups of weights and inputs do not nest"
        blocks = levels.split(self.block, dim=1)
        self.levels = nn.ParameterList(
            nn.Parameter(b.contiguous(), requires_grad=False) for b in blocks
        )
        self.sums = nn.Buffer(torch.stack([b.sum(1, dtype=torch.int32) for b in blocks]).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x: (..., in), in x's dtype."""
        rows = x.flatten(0, -2)
        encoded = self.path.encode(x)
        out = torch.zeros(rows.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        for index in range(len(self.levels)):
            out += self._block(index, encoded)
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def _block(self, index: int, encoded: Encoded) -> torch.Tensor:
        """Return one block's contribution: (tokens, out)."""
        levels, scale, zero = (t.flatten(0, -3) for t in encoded)
        start = index * self.block
        group, offset = divmod(start, levels.shape[-1])
        mine = levels[:, group, offset : offset + self.block]
        s, z = scale[:, group], zero[:, group]  # (tokens, 1)
        column = start * self.scale.shape[1] // self.in_features
        t, u = self.scale[:, column], self.zero[:, column]  # (out,)
        sums = self.matmul(self._integers(mine), self.levels[index]).to(self.dtype)
        sums = sums - z * self.sums[index]
        if not self.symmetric:
            sums = sums - (mine.sum(-1, keepdim=True) - self.block * z) * u
        return sums.mul_(s).mul_(t)

    def _integers(self, levels: torch.Tensor) -> torch.Tensor:
        quantizer = self.path.quantizer
        assert quantizer is not None
        kind = torch.int8 if quantizer.grid.symmetric else torch.uint8
        return levels.to(kind).contiguous()
