"""A linear that quantizes its input per token, multiplies integers exactly, and rescales.

With activation level a, scale s, zero z and weight level w, scale t, zero u, a block of n inputs
adds to an output

    y = Σ s(a - z)·t(w - u) = s·t·Σ a·w - s·z·(t·Σ w) - (s·Σ a - n·s·z)·(t·u)

Σ a·w is the integer product; the other two terms are a rank-one product per block.
"""

import torch
from torch import nn

from spinlab.quant.affine import Grid
from spinlab.quant.inputs import InputPath
from spinlab.runtime.kernels import Matmul
from spinlab.weights.quantized import QuantizedWeight


class IntegerLinear(nn.Module):
    """Run y = x Wᵀ + bias on integers. Weights rest as int8 levels, one byte each.

    Weights and activations may be grouped along the input; the product is cut into blocks of the
    finer grouping, which must refine the coarser one.
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
        dtype = torch.promote_types(dtype, torch.float32)  # of the epilogue; outputs follow inputs
        assert weight.grid.bits <= 8, "integer kernels take weights of at most 8 bits"
        assert path.quantizer is not None, "integer kernels take quantized inputs"
        shift = _into_int8(weight.grid)
        self.shift = _into_int8(path.quantizer.grid)
        self.path, self.matmul, self.symmetric = path, matmul, weight.grid.symmetric
        self.out_features, width = weight.levels.shape
        input_group = path.quantizer.group_size or width
        fine, coarse = sorted((input_group, width // weight.groups))
        assert coarse % fine == 0, "the groups of weights and inputs do not nest"
        self.block = fine
        blocks = (weight.levels - shift).to(torch.int8).split(self.block, dim=1)
        self.levels = nn.ParameterList(
            nn.Parameter(block.contiguous(), requires_grad=False) for block in blocks
        )
        repeats = len(blocks) // weight.groups
        scale = weight.scale.to(dtype).repeat_interleave(repeats, dim=1).T.contiguous()
        zero = (weight.zero - shift).to(dtype).repeat_interleave(repeats, dim=1).T
        sums = torch.stack([block.sum(1, dtype=torch.int32) for block in blocks]).to(dtype)
        # all (blocks, out): t, t·Σw, t·u
        self.scale, self.scaled_sums = nn.Buffer(scale), nn.Buffer(scale * sums)
        self.scaled_zero = nn.Buffer(scale * zero)
        self.bias = None if bias is None else nn.Buffer(bias.detach().to("cpu", dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x: (..., in), in x's dtype."""
        levels, s, sz = self._encode(x)
        # first what needs only sums over a block, for all blocks at once
        out = -sz @ self.scaled_sums
        if not self.symmetric:
            sums = levels.sum(-1).to(s.dtype)
            out -= (s * sums - self.block * sz) @ self.scaled_zero
        integers = levels.to(torch.int8)
        for index, weight in enumerate(self.levels):
            products = self.matmul(integers[:, index].contiguous(), weight).to(s.dtype)
            out.addcmul_(products.mul_(s[:, index, None]), self.scale[index])
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return levels (tokens, blocks, block) with s and s·z per token and block."""
        levels, scale, zero = (t.flatten(0, -3) for t in self.path.encode(x))
        blocks = levels.flatten(1).unflatten(1, (-1, self.block))
        repeats = blocks.shape[1] // scale.shape[1]
        scale, zero = (t.squeeze(-1).repeat_interleave(repeats, dim=1) for t in (scale, zero))
        if self.shift:
            blocks, zero = blocks - self.shift, zero - self.shift
        scale = scale.to(self.scale.dtype)
        return blocks, scale, scale * zero


def _into_int8(grid: Grid) -> int:
    """Return what levels and zero points are shifted down by: an asymmetric byte reaches 255."""
    return 0 if grid.highest <= 127 else 128
