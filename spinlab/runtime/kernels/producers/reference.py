"""The definition of what makes quantized inputs: norms, gates and rotations before a quantizer."""

import torch
from torch.nn import functional

from spinlab.fakequant.activations import Transform
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.kernels.formats import TokenLevels, into_int8


def quantize(x: torch.Tensor, quantizer: TokenQuantizer, *, summed: bool = True) -> TokenLevels:
    """Quantize x: (..., width), per token and group; the leading dimensions become tokens.

    summed: whether there are sums of levels, here as in what follows
    """
    assert quantizer.format.is_int8, "levels are bytes"
    encoded = quantizer.encode(x.reshape(-1, x.shape[-1]))
    shift = into_int8(quantizer.format)
    levels = (encoded.levels - shift).to(torch.int8)
    return TokenLevels(
        levels=levels.flatten(1),
        scale=encoded.scale.squeeze(-1),
        zero=(encoded.zero.squeeze(-1) - shift).to(torch.int32),
        sums=levels.sum(-1, dtype=torch.int32) if summed else None,
    )


def norm_quantize(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    epsilon: float,
    quantizer: TokenQuantizer,
    rotation: Transform | None = None,
    *,
    summed: bool = True,
) -> TokenLevels:
    """Quantize x/rms(x)·gain as transformers' RMSNorm rounds it, rotated where there is a rotation.

    x: (..., width), gain: (width,). The normed token is rounded to x's dtype before the gain, which
    is taken in that dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = normed.to(x.dtype)
    normed = normed if gain is None else gain.to(x.dtype) * normed
    return quantize(normed if rotation is None else rotation(normed), quantizer, summed=summed)


def gate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    rotation: Transform | None,
    quantizer: TokenQuantizer,
    *,
    summed: bool = True,
) -> TokenLevels:
    """Quantize silu(gate)·up, rotated where there is a rotation. gate, up: (..., width)."""
    gated = functional.silu(gate) * up
    return quantize(gated if rotation is None else rotation(gated), quantizer, summed=summed)


def rotate_quantize(
    x: torch.Tensor, rotation: Transform, quantizer: TokenQuantizer, *, summed: bool = True
) -> TokenLevels:
    """Quantize x: (..., width), after the rotation."""
    return quantize(rotation(x), quantizer, summed=summed)
