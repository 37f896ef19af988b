"""Round to nearest: every weight on its own, with the range chosen by the clip search."""

import torch

from spinlab.config import TensorQuant, WeightsConfig
from spinlab.formats.clip import ClipSearch, search_clip
from spinlab.formats.integer import Grid, encode, extremes, nearest, scale_and_zero, weight_grid
from spinlab.weights.quantized import QuantizedWeight


def round_to_nearest(
    weight: torch.Tensor, format: TensorQuant, clip: torch.Tensor | float
) -> QuantizedWeight:
    """Quantize a weight (out, in) with ranges shrunk by `clip`: (out, in/g, 1) or a number."""
    grouped, lowest, highest = extremes(weight, format.group_size)
    return round_to_range(grouped, lowest * clip, highest * clip, weight_grid(format))


def round_to_range(
    grouped: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, grid: Grid
) -> QuantizedWeight:
    """Quantize a grouped weight (out, in/g, g) with ranges of its groups: (out, in/g, 1) each."""
    scale, zero = scale_and_zero(lowest, highest, grid)
    levels = encode(grouped, scale, zero, grid, nearest).flatten(1).to(torch.int16)
    return QuantizedWeight(levels, scale.squeeze(-1), zero.squeeze(-1), grid)


def search_ratios(weight: torch.Tensor, format: TensorQuant, config: WeightsConfig) -> torch.Tensor:
    """Return the clip ratios that a config asks for: (out, in/g, 1)."""
    search = None
    if config.clip_search:
        search = ClipSearch(config.clip_norm, config.clip_grid, config.clip_max_shrink)
    ratios = search_clip(weight, weight_grid(format), format.group_size, search)
    return ratios * format.clip_ratio


def search_range(
    weight: torch.Tensor, format: TensorQuant, config: WeightsConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point that RTN gives a weight (out, in): (out, in/g) each."""
    clip = search_ratios(weight, format, config)
    _, lowest, highest = extremes(weight, format.group_size)
    scale, zero = scale_and_zero(lowest * clip, highest * clip, weight_grid(format))
    return scale.squeeze(-1), zero.squeeze(-1)


def rtn(weight: torch.Tensor, format: TensorQuant, config: WeightsConfig) -> QuantizedWeight:
    """Quantize a weight (out, in) to nearest after its clip search, in float32."""
    weight = weight.detach().float()
    return round_to_nearest(weight, format, search_ratios(weight, format, config))
