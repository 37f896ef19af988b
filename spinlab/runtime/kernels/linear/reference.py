"""The definition of products with packed weights."""

import torch

from spinlab.runtime.kernels.formats import PackedWeight, TokenLevels
from spinlab.runtime.kernels.matmul.reference import matmul


def linear(
    inputs: TokenLevels,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return inputs · weightᵀ + bias: (tokens, out) in `dtype`, and added to a tensor if given.

    added: (tokens, out), of that dtype; the sum is rounded once more, as it is of two tensors.

    Integers are exact up to the product with both scales, which is taken in the scales' dtype and
    summed over blocks. bias: (out,), in any float dtype.
    """
    blocks = weight.blocks
    levels = inputs.levels.unflatten(1, (blocks, -1))
    weights = weight.levels().unflatten(1, (blocks, -1))
    s, z = _repeat(inputs.scale, blocks), _repeat(inputs.zero, blocks)
    t = _repeat(weight.scale, blocks)
    u = None if weight.zero is None else _repeat(weight.zero, blocks)
    a = None if weight.zero is None else inputs.sums_of(blocks)
    out = torch.zeros(len(levels), weight.out_features, dtype=s.dtype, device=s.device)
    for index in range(blocks):
        found = matmul(levels[:, index], weights[:, index])
        found -= z[:, index, None] * weight.sums[:, index]
        if u is not None and a is not None:
            rest = a[:, index] - levels.shape[2] * z[:, index]
            found -= rest[:, None] * u[:, index]
        found = found.to(s.dtype) * s[:, index, None]
        out += found if weight.groups == 1 else found * t[:, index]
    if weight.groups == 1:
        out *= t[:, 0]
    if bias is not None:
        out += bias.to(out.dtype)
    return out.to(dtype) if added is None else added + out.to(dtype)


def linear16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x · weightᵀ + bias for inputs that are not quantized: (tokens, out) in x's dtype.

    x: (tokens, in). Products are taken in float32 or wider. added: as for `linear`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ dequantize(weight, wide).mT
    out = (out if bias is None else out + bias.to(wide)).to(x.dtype)
    return out if added is None else added + out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the floats (out, in) that a packed weight stands for."""
    wide = torch.promote_types(dtype, torch.float32)
    levels = weight.levels().to(wide).unflatten(1, (weight.groups, -1))
    if weight.zero is not None:
        levels = levels - weight.zero.to(wide)[..., None]
    return (levels * weight.scale.to(wide)[..., None]).flatten(1).to(dtype)


def _repeat(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Give every block the value of its group: (n, groups) to (n, blocks)."""
    return x.repeat_interleave(blocks // x.shape[1], dim=1)
