"""Experts that get no token of the calibration text: nothing is known of what they read."""

import logging
from collections.abc import Collection

import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.model.modules import map_of
from spinlab.weights.base import Rounding
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import round_to_nearest, search_ratios

log = logging.getLogger(__name__)


def unswept(
    weight: torch.Tensor, format: TensorQuant, ratios: torch.Tensor | None, clip: ClipSearch
) -> QuantizedWeight:
    """Round a weight (out, in) to nearest, in learned ranges (out, in/g, 1) where there are any."""
    weight = weight.detach().float()
    if ratios is None:
        ratios = search_ratios(weight, format, clip)
    return round_to_nearest(weight, format, ratios)


def warn_of_unseen(rounding: Rounding, layer: int, names: Collection[str]) -> None:
    """Say how many experts of a layer got no token; names: their linears, if there are any."""
    sites, windows = map_of(rounding.model).site_at, rounding.config.windows
    if experts := {sites[name].expert for name in names}:
        assert windows is not None
        log.warning(
            "layer %d: no token of the calibration text goes to %d of its experts, whose weights "
            "are rounded to nearest: raise %s.samples",
            layer,
            len(experts),
            windows.place,
        )
