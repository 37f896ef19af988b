"""Round to nearest: every weight on its own, with the range chosen by the clip search."""

import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.formats import Format, Parameters, format_of
from spinlab.formats.clip import search_clip
from spinlab.formats.integer import extremes, nearest
from spinlab.weights.quantized import QuantizedWeight


def round_to_nearest(
    weight: torch.Tensor, settings: TensorQuant, clip: torch.Tensor | float
) -> QuantizedWeight:
    """Quantize a weight (out, in) with ranges shrunk by `clip`: (out, in/g, 1) or a number."""
    grouped, lowest, highest = extremes(weight, settings.group_size)
    return round_to_range(grouped, lowest * clip, highest * clip, format_of(settings))


def round_to_range(
    grouped: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, format: Format
) -> QuantizedWeight:
    """Quantize a grouped weight (out, in/g, g) with ranges of its groups: (out, in/g, 1) each."""
    parameters = format.parameters(lowest, highest)
    levels = format.encode(grouped, parameters, nearest).flatten(1).to(torch.int16)
    return QuantizedWeight(levels, *(p.squeeze(-1) for p in parameters), format=format)


def search_ratios(weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> torch.Tensor:
    """Return the ratios of a weight's ranges (out, in) that are kept: (out, in/g, 1)."""
    ratios = search_clip(weight, format_of(settings), settings.group_size, clip)
    return ratios * settings.clip_ratio


def search_range(
    weight: torch.Tensor,
    settings: TensorQuant,
    clip: ClipSearch,
    ratios: torch.Tensor | None = None,
) -> Parameters:
    """Return the scale and zero point that RTN gives a weight (out, in): (out, in/g) each.

    ratios: (out, in/g, 1), those of its ranges that are kept, where no search is needed.
    """
    if ratios is None:
        ratios = search_ratios(weight, settings, clip)
    _, lowest, highest = extremes(weight, settings.group_size)
    parameters = format_of(settings).parameters(lowest * ratios, highest * ratios)
    return Parameters(*(p.squeeze(-1) for p in parameters))


def rtn(weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> QuantizedWeight:
    """Quantize a weight (out, in) to nearest after its clip search, in float32."""
    weight = weight.detach().float()
    return round_to_nearest(weight, settings, search_ratios(weight, settings, clip))
