"""The outputs of a linear that multiplies integers exactly, block by block, and rescales.

The arithmetic is that of `spinlab.runtime.kernels.formats`; `IntegerLinear` does the same for a few
numbers in NumPy, and `spinlab.runtime.kernels.linear` on packed weights, in another order.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from spinlab.formats.quantizer import Encoded
from spinlab.runtime.kernels.matmul.reference import Matmul

# outputs, and tokens at least, that a CPU takes through all blocks before it takes others: what its
# cache holds
_TILE, _ROWS = 1 << 19, 32


class Tables(NamedTuple):
    """Hold what a linear knows of its weight, for blocks that tile its inputs.

    levels  (out, in)        int8
    sums    (blocks, out)    int32, Σ levels of a block
    scale   (blocks, 1, out) float32
    zero    (blocks, 1, out) int32, or None on a symmetric grid
    """

    levels: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def outputs(
    matmul: Matmul,
    inputs: Encoded,
    tables: Tables,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the outputs (tokens, out) in a dtype; sums of blocks and bias have the scales'.

    matmul: the product of a block, see `spinlab.runtime.kernels.matmul`. inputs: levels
    (tokens, in), bytes of either sign, with scale and zero (tokens, groups, 1) of some blocks each.
    bias: (out,).
    """
    rows = max(1, len(inputs.levels))
    if tables.levels.device.type == "cpu":
        rows = max(_ROWS, _TILE // len(tables.levels))
    parts = zip(*(t.split(rows) for t in inputs), strict=True)
    found = [_added(matmul, Encoded(*part), tables, bias).to(dtype) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _added(
    matmul: Matmul, inputs: Encoded, tables: Tables, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return what blocks and the bias add up to, in the scales' dtype."""
    terms = terms_of(matmul, inputs, tables)
    out = next(terms)
    for term in terms:
        out += term
    if bias is not None:
        out += bias
    return out


def terms_of(matmul: Matmul, inputs: Encoded, tables: Tables) -> Iterator[torch.Tensor]:
    """Return what each block adds to the outputs: (tokens, out)."""
    levels, *ranges = inputs
    blocks = len(tables.sums)
    if ranges[0].shape[1] < blocks:
        ranges = [t.repeat_interleave(blocks // t.shape[1], dim=1) for t in ranges]
    parts: list[Sequence[torch.Tensor] | torch.Tensor] = [levels.chunk(blocks, 1)]
    parts += [t.unbind(1) for t in ranges]
    parts += [tables.levels.chunk(blocks, 1), tables.sums, tables.scale]
    parts += [] if tables.zero is None else [tables.zero]
    return (_scaled(matmul, *part) for part in zip(*parts, strict=True))


def _scaled(
    matmul: Matmul,
    levels: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    t: torch.Tensor,
    u: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return s·t·I of a block: (tokens, out)."""
    found = matmul(levels.contiguous(), weight.contiguous())
    found.addcmul_(z, sums, value=-1)
    if u is not None:
        rest = levels.sum(1, keepdim=True, dtype=torch.int32) - levels.shape[1] * z
        found.addcmul_(rest, u, value=-1)
    return found.to(s.dtype, memory_format=torch.contiguous_format).mul_(s * t)
