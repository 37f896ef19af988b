"""Round to nearest: every weight on its own, with the range chosen by the clip search."""

from typing import NamedTuple

import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.formats import Format, Parameters, format_of
from spinlab.formats.base import peak_of
from spinlab.formats.clip import search_clip
from spinlab.formats.integer import extremes, nearest
from spinlab.weights.quantized import QuantizedWeight

WEIGHT = (-3, -2)  # the dimensions of ranges (..., out, in/g, 1) that make one weight


class Searched(NamedTuple):
    """Hold scale and zero point of a weight: (out, in/g) each, and its peak (`peak_of`)."""

    parameters: Parameters
    peak: torch.Tensor | None


def round_to_nearest(
    weight: torch.Tensor, settings: TensorQuant, clip: torch.Tensor | float
) -> QuantizedWeight:
    """Quantize a weight (..., out, in) with ranges shrunk by `clip`.

    clip: (..., out, in/g, 1) or a number. Several weights become one, row after row.
    """
    grouped, lowest, highest = extremes(weight, settings.group_size)
    return round_to_range(grouped, lowest * clip, highest * clip, format_of(settings))


def round_to_range(
    grouped: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, format: Format
) -> QuantizedWeight:
    """Do it for grouped weights (..., out, in/g, g) with ranges of groups: (..., out, in/g, 1)."""
    peak = peak_of(format, lowest, highest, WEIGHT)
    parameters = format.choose(grouped, lowest, highest, peak)
    levels = format.encode(grouped, parameters, nearest).flatten(-2).to(torch.int16)
    rows = (t.flatten(0, -2) for t in (levels, *(p.squeeze(-1) for p in parameters)))
    return QuantizedWeight(*rows, format=format)


def search_ratios(weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> torch.Tensor:
    """Return the ratios of a weight's ranges (..., in) that are kept: (..., in/g, 1)."""
    ratios = search_clip(weight, format_of(settings), settings.group_size, clip)
    return ratios * settings.clip_ratio


def starting_ratios(weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> torch.Tensor:
    """Return ratios for learning to start from: (..., in/g, 1).

    They round as searched ones do, but for scales of NVFP4 that are subnormal numbers of E4M3, and
    leave small steps room to change no scale.
    """
    _, lowest, highest = extremes(weight, settings.group_size)
    return format_of(settings).centred(search_ratios(weight, settings, clip), lowest, highest)


def search_range(
    weight: torch.Tensor,
    settings: TensorQuant,
    clip: ClipSearch,
    ratios: torch.Tensor | None = None,
    peak: torch.Tensor | None = None,
) -> Searched:
    """Return the ranges that RTN gives a weight (out, in).

    ratios: (out, in/g, 1), those of its ranges that are kept, where no search is needed. peak: that
    of the whole weight, where this one is a part of it.
    """
    if ratios is None:
        ratios = search_ratios(weight, settings, clip)
    format = format_of(settings)
    grouped, lowest, highest = extremes(weight, settings.group_size)
    lowest, highest = lowest * ratios, highest * ratios
    peak = peak_of(format, lowest, highest, WEIGHT) if peak is None else peak
    parameters = format.choose(grouped, lowest, highest, peak)
    return Searched(Parameters(*(p.squeeze(-1) for p in parameters)), peak)


def rtn(weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> QuantizedWeight:
    """Quantize a weight (out, in) to nearest after its clip search, in float32."""
    weight = weight.detach().float()
    return round_to_nearest(weight, settings, search_ratios(weight, settings, clip))
