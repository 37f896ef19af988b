"""A linear that quantizes its input per token, multiplies integers exactly, and rescales.

The arithmetic is that of `spinlab.runtime.kernels.formats`: a block of inputs adds s·t·I to an
output, with an integer I = Σ a·w - z·Σ w - u·(Σ a - n·z) that int32 holds exactly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from spinlab.fakequant.activations import IdentityCache, InputPath
from spinlab.formats.quantizer import Encoded
from spinlab.runtime.kernels.formats import into_int8
from spinlab.runtime.kernels.matmul import KERNELS, Matmul, outputs_for
from spinlab.runtime.kernels.matmul.groups import Tables
from spinlab.weights.quantized import QuantizedWeight

_MOST_ROWS = 16  # of one product for all blocks, each row 0 outside its own


class _Views(NamedTuple):
    """Hold the tables of a linear for a few tokens: t, Σ w, u, bias, and who is in which block."""

    path: InputPath
    weights: torch.Tensor
    member: np.ndarray  # (blocks, in) of 0 and 1
    t: np.ndarray
    sums: np.ndarray
    u: np.ndarray | None
    bias: np.ndarray | None


class IntegerLinear(nn.Module):
    """Run y = x Wᵀ + bias on integers. Weights rest as int8 levels, one byte each.

    Weights and activations may be grouped along the input; the product is cut into blocks of the
    finer grouping, which must refine the coarser one. Input levels are bytes from 0 on, with which
    processors multiply one row faster than with signed ones; of several rows the reverse is true.
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
        assert weight.format.is_int8, "integer kernels take weights of at most 8 bits"
        assert path.quantizer is not None, "integer kernels take quantized inputs"
        assert path.quantizer.format.is_int8, "integer kernels take inputs of at most 8 bits"
        shift = into_int8(weight.format)
        self.path, self.matmul = path, matmul
        self.out_features, width = weight.levels.shape
        input_group = path.quantizer.group_size or width
        fine, coarse = sorted((input_group, width // weight.groups))
        assert coarse % fine == 0, "the groups of weights and inputs do not nest"
        self.block, self.blocks = fine, width // fine
        self.may_sign = path.quantizer.format.bits < 8  # bytes up to 127 are the same signed
        levels = (weight.levels - shift if shift else weight.levels).to(torch.int8).contiguous()
        self.levels = nn.Parameter(levels, requires_grad=False)  # (out, in)
        # all (blocks, out): t, Σ w, u
        self.scale = nn.Buffer(_per_block(weight.scale.to(dtype), self.blocks))
        self.sums = nn.Buffer(_sums(levels, self.blocks))
        zero = None if weight.format.symmetric else (weight.zero - shift).to(torch.int32)
        self.zero = None if zero is None else nn.Buffer(_per_block(zero, self.blocks))
        self.bias = None if bias is None else nn.Buffer(bias.detach().to("cpu", dtype))
        self._views: _Views | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x: (..., in), in x's dtype."""
        rows = x.numel() // x.shape[-1] * self.blocks
        quantizer = self.path.quantizer
        assert quantizer is not None
        if quantizer.takes_few(x) and (self.blocks == 1 or rows <= _MOST_ROWS):
            out = torch.from_numpy(self._few(x).reshape(*x.shape[:-1], -1))
            return out if out.dtype == x.dtype else out.to(x.dtype)
        tables = self.tables()
        outputs = outputs_for(self.matmul, tables)
        return outputs(self.encode(x), tables, self.bias, x.dtype).view(
            *x.shape[:-1], self.out_features
        )

    def _few(self, x: torch.Tensor) -> np.ndarray:
        """Return the output (tokens, out) for a few numbers in the host's memory.

        The steps are those of many, in numpy, whose calls cost a fraction of torch's.
        """
        if self._views is None:
            self._views = self._view_tables()
        path, weights, member, t, sums, u, bias = self._views
        levels, s, z = path.encode_few(x)
        blocks = len(t)
        levels = levels.reshape(-1, blocks, self.block)
        if s.ndim:  # else there is but one token and group
            s, z = (self._each_block(part) for part in (s, z))
        # rows that are 0 outside one block each: one product gives those of all blocks
        rows = levels[:, 0] if blocks == 1 else (levels.reshape(-1, 1, member.shape[1]) * member)
        rows = rows.reshape(-1, member.shape[1])
        if self.may_sign and len(rows) > 1:
            rows = rows.view(np.int8)
        found = self.matmul(torch.from_numpy(rows), weights).numpy()
        found = found.reshape(len(levels), blocks, -1)
        found -= z * sums
        if u is not None:
            rest = levels.sum(2, keepdims=True, dtype=np.int32) - np.int32(self.block) * z
            found -= rest * u
        terms = found.astype(t.dtype, order="C")
        terms *= s.astype(t.dtype, copy=False) * t
        out = terms[:, 0] if blocks == 1 else np.add.reduce(terms, axis=1)  # in turn
        if bias is not None:
            out += bias
        return out

    def _each_block(self, table: np.ndarray) -> np.ndarray:
        """Give every block the numbers of its group: (..., groups, 1) to (tokens, blocks, 1)."""
        groups = table.shape[-2]
        table = table.reshape(-1, groups, 1)
        return table if groups == self.blocks else table.repeat(self.blocks // groups, axis=1)

    def _view_tables(self) -> _Views:
        """Return what `_few` reads as it reads it; looking it up would cost as much as the work."""
        zero, bias = (None if t is None else t.numpy() for t in (self.zero, self.bias))
        member = np.eye(self.blocks, dtype=np.uint8).repeat(self.block, axis=1)
        scale, sums = self.scale.numpy(), self.sums.numpy()
        return _Views(self.path, self.levels.detach(), member, scale, sums, zero, bias)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._views = None  # tables move, and leave the views behind
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._views = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None}  # a copy views tables of its own

    def tables(self) -> Tables:
        """Return what products of blocks know of the weight."""
        return Tables(self.levels, self.sums, self.scale, self.zero)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return levels (tokens, in) of x (..., in), with s and z: (tokens, groups, 1)."""
        levels, scale, zero = self.path.encode(x)
        groups, levels = scale.shape[-2], levels.reshape(-1, self.levels.shape[1])
        if self.may_sign and len(levels) > 1:
            levels = levels.view(torch.int8)
        scale, zero = (t.reshape(-1, groups, 1) for t in (scale.to(self.scale.dtype), zero))
        return Encoded(levels, scale, zero)


class LinearPart(nn.Module):
    """Be one of several linears that read the very same input and are multiplied as one.

    The first of them that is called multiplies; all take their columns of the result.
    rows: outputs of each; index: which this one is.
    """

    def __init__(
        self, whole: IntegerLinear, once: IdentityCache, rows: Sequence[int], index: int
    ) -> None:
        super().__init__()
        self.whole, self.once, self.rows, self.index = whole, once, list(rows), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x: (..., in), in x's dtype."""
        return self.once(x, self._multiply)[self.index]

    def _multiply(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of all."""
        return self.whole(x).split(self.rows, dim=-1)


def stacked_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Return the biases of stacked linears as one (out,), zeros where one has none.

    None where no linear has a bias.
    """
    if all(linear.bias is None for linear in linears):
        return None
    rows = (linear.weight.new_zeros(linear.out_features) for linear in linears)
    pairs = zip(rows, linears, strict=True)
    return torch.cat([r if x.bias is None else x.bias.detach() for r, x in pairs])


def _sums(levels: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return Σ w of every block: (blocks, out) int32.

    On a CPU it is a product with ones: summing bytes takes twenty times as long.
    """
    rows = levels.view(levels.shape[0] * blocks, -1)
    if levels.device.type == "cpu":
        found = KERNELS["cpu"](torch.ones(1, rows.shape[1], dtype=torch.uint8), rows)
    else:
        found = rows.sum(1, dtype=torch.int32)
    return found.view(-1, blocks).T.contiguous()


def _per_block(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Give every block the values of its group: (out, groups) to (blocks, 1, out)."""
    return x.repeat_interleave(blocks // x.shape[1], dim=1).T.contiguous()
