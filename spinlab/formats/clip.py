"""Clip search for weights: shrink each channel's range until its rounding error is smallest."""

import torch

from spinlab.config import ClipSearch
from spinlab.formats.base import Format, Parameters
from spinlab.formats.integer import extremes, nearest

# numbers of a weight worked on at once: on a CPU what its caches hold, on a GPU what keeps it busy
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
# the same of all ratios tried at once: of a group alone, a ratio is less work than its launches
_TRIED_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 22}
_CHECKED = 4  # ratios between looks for whether any smaller one can win
_TINY = 1e-6  # of a level; keeps logarithms of 0 out, which are several times slower


def search_clip(
    weight: torch.Tensor, format: Format, group_size: int, search: ClipSearch
) -> torch.Tensor:
    """Return the ratio by which each channel's (or group's) range is best shrunk.

    weight: (..., in), in units of its own; result: (..., in/g, 1) in (0, 1]. Without a search all
    ratios are 1. Ties go to the larger ratio.
    """
    grouped, lowest, highest = extremes(weight, group_size)
    best = torch.ones_like(lowest)
    if not search.search:
        return best
    rows = grouped.flatten(0, -2)
    step = max(1, _CHUNK_ELEMENTS[weight.device.type] // rows.shape[-1])
    parts = zip(
        rows.split(step),
        lowest.view(-1, 1).split(step),
        highest.view(-1, 1).split(step),
        strict=True,
    )
    return torch.cat([_search_rows(*part, format, search) for part in parts]).view_as(best)


def _search_rows(
    rows: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    format: Format,
    search: ClipSearch,
) -> torch.Tensor:
    """Return the best ratio of each row (rows, g), ratios of the grid in the first dimension."""
    best = torch.ones_like(lowest)
    smallest = torch.full_like(lowest, torch.inf)
    at_once = max(1, _TRIED_ELEMENTS[rows.device.type] // rows.numel())
    ratios = torch.tensor(search.ratios(), dtype=rows.dtype, device=rows.device)
    parts = ratios.view(-1, 1, 1).split(at_once)
    for i, tried in enumerate(parts, 1):
        parameters = format.choose(rows, lowest * tried, highest * tried, None)
        rounded = format.decode(format.encode(rows, parameters, nearest), parameters)
        error = _power_sum(rounded.sub_(rows), search.norm)
        first = error.argmin(0, keepdim=True)  # of equal ones
        error = error.gather(0, first).squeeze(0)
        better = error < smallest
        best = torch.where(better, tried[first.squeeze(0), 0, 0], best)
        smallest = torch.where(better, error, smallest)
        if i < len(parts) and i % max(1, _CHECKED // at_once) == 0:
            narrowest = Parameters(*(part[-1] for part in parameters))
            if (_clipped_error(rows, narrowest, format, search) >= smallest).all():
                break
    return best


def _clipped_error(
    rows: torch.Tensor, parameters: Parameters, format: Format, search: ClipSearch
) -> torch.Tensor:
    """Return the part of the error that lies outside the range: it only grows as ratios shrink.

    Once it alone exceeds the smallest error found, no smaller ratio can win.
    """
    bottom, top = format.bounds(parameters)
    outside = torch.maximum(rows - top, bottom - rows)
    least = _TINY * parameters.scale
    return _power_sum(torch.maximum(outside, least, out=outside), search.norm)


def _power_sum(difference: torch.Tensor, norm: float) -> torch.Tensor:
    """Sum |difference|^norm over the last dimension.

    exp(norm·log|d|) is ten times faster on a CPU than pow with a fractional exponent, and maps 0
    to 0.
    """
    return difference.abs_().log_().mul_(norm).exp_().sum(-1, keepdim=True)
