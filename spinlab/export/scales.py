"""Scales of rounded weights in the 16 bits that files of other tools have for them."""

import torch

from spinlab.errors import InputError
from spinlab.formats.integer import smallest_scale
from spinlab.weights.quantized import QuantizedWeight


def stored_scale(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the scales (out, groups) of a weight with symmetric levels in a dtype of 16 bits.

    Raises InputError where one becomes infinite, or moves a weight by more than half a level: a
    normal number is off by at most 2^-9 of itself, a quarter of a level for 128 of them, but below
    the normal numbers, and where it becomes zero, by more. The level is the largest of the weight's
    row, whose rounding the output has anyway, so that groups of next to nothing may vanish, and
    so may those of the smallest scale that there is, which stands for zeros.
    """
    scale = weight.scale.float().cpu()
    stored = scale.to(dtype)
    most = weight.levels.cpu().abs().unflatten(1, (weight.groups, -1)).amax(-1)
    moved = (stored.float() - scale).abs() * most
    level = scale.amax(1, keepdim=True)
    near = (moved <= level / 2) | (level <= smallest_scale(torch.float32))
    wrong = ~(near & stored.isfinite())
    if wrong.any():
        raise InputError(
            f"the scale of {name} holds {scale[wrong][0].item():.3g}, which {dtype} stores as "
            f"{stored[wrong][0].item():.3g}: use export.artefact, whose scales are float32"
        )
    return stored
