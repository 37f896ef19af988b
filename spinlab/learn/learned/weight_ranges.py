"""Learned weight ranges: clip ratios that descend together with the rotations.

With weights quantized in the loop, plain straight-through gradients never tell a rotation, or a
clip ratio, that a smaller range is better. Here the rounding is differentiated as in LSQ (Esser et
al. 2020) and each channel's ratio is learned, as OmniQuant's learnable weight clipping does.
"""

import torch

from spinlab.config import TensorQuant
from spinlab.formats.integer import scale_and_zero, weight_grid

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


def rounding_gradient(
    weight: torch.Tensor, gradient: torch.Tensor, format: TensorQuant, clip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pull the gradient of a rounded weight back to the weight and to the log of its clip ratios.

    Inside the range rounding passes the gradient straight through, outside it passes none; the
    range, clip times the extremes of a channel or group, gets the rest (LSQ) and hands it to the
    extreme entries. The zero point counts as exact. weight, gradient: (out, in); clip and the
    second result: (out, in/g, 1). The first result overwrites `gradient`.
    """
    rows = max(1, _CHUNK_ELEMENTS[weight.device.type] // weight.shape[1])
    parts = zip(weight.split(rows), gradient.split(rows), clip.split(rows), strict=True)
    of_rows = _symmetric if format.symmetric else _asymmetric
    return gradient, torch.cat([of_rows(*part, format) for part in parts])


def _symmetric(
    weight: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor, format: TensorQuant
) -> torch.Tensor:
    """Turn `gradient` into the weight's; return the log ratio's. scale = clip·max|w| / highest."""
    grid = weight_grid(format)
    grouped = _groups(weight, format)
    peak, at_peak = grouped.abs().max(-1, keepdim=True)
    scale, _ = scale_and_zero(-peak * clip, peak * clip, grid)
    exact = grouped / scale
    levels = exact.round()
    kept = levels.clamp(grid.lowest, grid.highest)
    passed = _groups(gradient, format)
    of_levels = _dot(passed, kept)  # inside the range kept - exact, outside kept alone
    passed.addcmul_(passed, _outside(levels, kept), value=-1)
    of_scale = of_levels - _dot(passed, exact)
    share = of_scale * clip / grid.highest * grouped.gather(-1, at_peak).sign()
    passed.scatter_add_(-1, at_peak, share)
    return of_scale * scale


def _asymmetric(
    weight: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor, format: TensorQuant
) -> torch.Tensor:
    """The same for scale = clip·(max - min) / highest, where clipped entries sit on an end."""
    grid = weight_grid(format)
    grouped = _groups(weight, format)
    lowest, at_lowest = grouped.min(-1, keepdim=True)
    highest, at_highest = grouped.max(-1, keepdim=True)
    scale, zero = scale_and_zero(lowest * clip, highest * clip, grid)
    exact = grouped / scale
    levels = exact.round()
    kept = levels.clamp(grid.lowest - zero, grid.highest - zero)
    of_rounding = levels - exact
    passed, clipped = _split(_groups(gradient, format), levels, kept)
    of_scale = _dot(passed, of_rounding) / grid.highest
    of_top = (_dot(clipped, (kept > 0).to(clipped.dtype)) + of_scale) * clip * (highest > 0)
    of_bottom = (_dot(clipped, (kept <= 0).to(clipped.dtype)) - of_scale) * clip * (lowest < 0)
    passed.scatter_add_(-1, at_highest, of_top).scatter_add_(-1, at_lowest, of_bottom)
    return of_top * highest + of_bottom * lowest


def _groups(matrix: torch.Tensor, format: TensorQuant) -> torch.Tensor:
    return matrix.unflatten(-1, (-1, format.group_size or matrix.shape[-1]))


def _split(
    gradient: torch.Tensor, levels: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a gradient, in place, into that of entries inside and outside the range."""
    clipped = _outside(levels, kept).mul_(gradient)
    return gradient.sub_(clipped), clipped


def _outside(levels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return 1 where a level was clipped, else 0; levels are overwritten."""
    # differences: comparisons cost ten times as much on a CPU
    return levels.sub_(kept).abs_().clamp_(max=1)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)
