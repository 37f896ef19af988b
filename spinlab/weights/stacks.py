"""Round the linears that read one input, those of one format in one sweep."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from spinlab import parallel
from spinlab.config import TensorQuant, WeightsConfig
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.model.modules import linear_at
from spinlab.weights.base import Rounding
from spinlab.weights.gptq import ErrorSpread, NoRows
from spinlab.weights.mismatch import Mismatch
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import search_ratios
from spinlab.weights.unseen import unswept

# what a sweep knows of a linear's inputs, and a sweep
Factors = TypeVar("Factors", ErrorSpread, Mismatch)
Sweeping = Callable[
    [torch.Tensor, Factors, TensorQuant, WeightsConfig, torch.Tensor | None], QuantizedWeight
]
# the paths of linears, by their format and what else parts them
Stacks = dict[tuple[TensorQuant, str], list[str]]


def round_stacks(
    rounding: Rounding,
    stacks: Stacks,
    factors: Callable[[FakeQuantLinear], Factors],
    sweep: Sweeping[Factors],
) -> dict[str, QuantizedWeight] | None:
    """Return the rounded weights of linears that read one input; None where it has no rows.

    What is known of the input, and the weights as they were, are gone with this call: they would
    stand beside the Hessian of the next input.
    """
    first = next(iter(stacks.values()))[0]
    try:
        known = factors(cast(FakeQuantLinear, linear_at(rounding.model, first)))
    except NoRows:
        return None

    def swept(
        weight: torch.Tensor, format: TensorQuant, ratios: torch.Tensor | None
    ) -> QuantizedWeight:
        return sweep(weight, known, format, rounding.config, ratios)

    return _rounded(rounding, stacks, swept)


def round_unseen(rounding: Rounding, stacks: Stacks) -> dict[str, QuantizedWeight]:
    """Return the weights of linears of whose input nothing is known, each rounded to nearest."""

    def to_nearest(
        weight: torch.Tensor, format: TensorQuant, ratios: torch.Tensor | None
    ) -> QuantizedWeight:
        return unswept(weight, format, ratios, rounding.config.clip)

    return _rounded(rounding, stacks, to_nearest)


def _rounded(
    rounding: Rounding,
    stacks: Stacks,
    work: Callable[[torch.Tensor, TensorQuant, torch.Tensor | None], QuantizedWeight],
) -> dict[str, QuantizedWeight]:
    """Round the weights of every stack at once, and cut what comes of it."""
    found: dict[str, QuantizedWeight] = {}
    for (format, _), stack in stacks.items():
        weights = [linear_at(rounding.model, name).weight for name in stack]
        whole = work(torch.cat(weights), format, _ratios(rounding, stack, format))
        parallel.share_tensors([whole.levels, whole.scale, whole.zero])
        rows = [weight.shape[0] for weight in weights]
        found |= zip(stack, whole.split(rows), strict=True)
    return found


def _ratios(rounding: Rounding, stack: list[str], format: TensorQuant) -> torch.Tensor | None:
    """Return the clip ratios of stacked weights where they were learned: (out, in/g, 1).

    A weight without any, beside others, gets its clip search.
    """
    learned, device = rounding.rotations.weight_clips, rounding.model.device
    if not learned.keys() & set(stack):
        return None
    found = []
    for name in stack:
        weight = linear_at(rounding.model, name).weight.detach().float()
        known = learned.get(name)
        found.append(
            search_ratios(weight, format, rounding.config.clip)
            if known is None
            else known.to(device)
        )
    return torch.cat(found)
