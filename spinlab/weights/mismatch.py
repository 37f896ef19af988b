"""GPTAQ and Qronos: round so that outputs come close to the original's, whose inputs are others.

GPTQ keeps W X, with X the inputs in the quantized network; these two keep W X̃, with X̃ the inputs
of the same linear in the original. What they need beside H = X Xᵀ is D = (X̃ - X) Xᵀ. With λ, the
damping of H, both follow ‖Q X - W X̃‖² + λ ‖Q - W‖², whose minimum over all Q, rounded or not, is
W + W D (H + λ)⁻¹. Where X̃ = X both are GPTQ, bit for bit.
"""

from dataclasses import dataclass

import torch

from spinlab.config import GPTAQConfig, TensorQuant, WeightsConfig
from spinlab.finite import check_finite
from spinlab.weights.gptq import ErrorSpread, Sweep, error_spread, ranges_of
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Mismatch:
    """What a sweep needs to know of H and D; it serves all weights that read the same inputs.

    All is in the order of rounding, in float32. part, A: (in, in), with R and s of the spread
    A = D Rᵀ diag(s), so that D (H + λ)⁻¹ = A R. first: (in,) the first column of D over H's first
    diagonal entry.
    """

    spread: ErrorSpread
    part: torch.Tensor
    first: torch.Tensor


def mismatch(hessian: torch.Tensor, cross: torch.Tensor, config: GPTAQConfig) -> Mismatch:
    """Factor H (in, in) and project D (in, in), times its strength, on the factor.

    Raises InputError where H cannot be factored, ResultError for what is not finite.
    """
    spread = error_spread(hessian, config)
    check_finite({"the mismatch of inputs": cross}, "the model is broken, or inputs overflow")
    cross = cross[spread.order][:, spread.order] * config.strength
    power = hessian.diagonal()[spread.order[0]]
    first = cross[:, 0] / (power + (power == 0))
    return Mismatch(spread, (cross @ spread.rows.mT).mul_(spread.squares), first)


def looking_ahead(found: Mismatch) -> torch.Tensor:
    """Return P: (in, in), in the order of rounding (GPTAQ, theorem 4.2).

    Row c is how the columns after c take up what c's input lacks: D's row, over them, times the
    inverse of their Hessian. A column without input takes nothing up and is as good as behind all
    others already: its row is over all of them.
    """
    over = found.part.triu(1)
    dead = found.spread.dead[found.spread.order]
    over = torch.where(dead[:, None], found.part, over)
    return over @ found.spread.rows


@torch.no_grad()
def gptaq(
    weight: torch.Tensor,
    found: Mismatch,
    settings: TensorQuant,
    config: WeightsConfig,
    ratios: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight (out, in) by GPTAQ (Li et al. 2025, arXiv 2504.02692, algorithm 1).

    When a column is reached, what its input lacks, times the column as it stands (eq. 15), goes to
    the later columns beside its rounding error. The algorithm prints the lazy update for blocks
    alone; with eq. 18 nothing depends on how columns are blocked. Ranges are those of GPTQ.
    """
    weight, order = weight.detach().float(), found.spread.order
    live = weight.masked_fill(found.spread.dead, 0)
    columns, ahead = live[:, order], looking_ahead(found)
    dead = found.spread.dead[order]
    if dead.any():
        columns += weight[:, order][:, dead] @ ahead[dead]
    ranges = ranges_of(live, settings, config, ratios)
    return Sweep(columns, found.spread, ranges, settings, config, ahead=ahead).rounded()


@torch.no_grad()
def qronos(
    weight: torch.Tensor,
    found: Mismatch,
    settings: TensorQuant,
    config: WeightsConfig,
    ratios: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight (out, in) by Qronos (Zhang et al. 2025, arXiv 2505.11695).

    The first column is rounded where it makes up best for all that the inputs lack, while the rest
    is still as it was; then the rest moves to where it is best with that, and what follows is GPTQ
    (the paper's equivalent form). So the sweep runs over W + W D (H + λ)⁻¹. λ is GPTQ's, where the
    paper takes a share of the largest singular value. Ranges are searched for what the sweep runs
    over, which is smaller than W; learned ones are shares of W's.
    """
    weight, order = weight.detach().float(), found.spread.order
    live = weight.masked_fill(found.spread.dead, 0)
    exact = weight[:, order]
    columns = live[:, order] + (exact @ found.part) @ found.spread.rows
    first = live[:, order[0]] + exact @ found.first
    ranged = columns[:, torch.argsort(order)] if ratios is None else live
    ranges = ranges_of(ranged, settings, config, ratios)
    return Sweep(columns, found.spread, ranges, settings, config, first=first).rounded()
