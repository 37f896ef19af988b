"""GPTQ: round column by column, spreading each error over the columns still to come.

Frantar et al. 2022, with Cholesky reformulation (sec. 3.3, step 3) and lazy batches (step 2).
"""

from dataclasses import replace

import torch

from spinlab.config import TensorQuant, WeightsConfig
from spinlab.quant.affine import decode, encode, extremes, scale_and_zero
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import rtn, search_ratios, weight_grid


class Hessian:
    """Gather H = 2/n Σ xᵀx of a linear's input rows, in float32 with TF32 off."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add input rows x: (..., width)."""
        rows = x.detach().flatten(0, -2).float()
        self.sum.addmm_(rows.mT, rows)
        self.rows += rows.shape[0]

    def value(self) -> torch.Tensor:
        return self.sum * (2 / max(self.rows, 1))


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, format: TensorQuant, config: WeightsConfig
) -> QuantizedWeight:
    """Quantize a weight (out, in) so that its outputs on the calibration inputs change least.

    hessian: (in, in), the second moment of the inputs up to a factor. Columns with no input are
    set to zero. Without groups the ranges are those of RTN, so the two differ in rounding only;
    with groups each range is taken from the columns as updated when the group is reached. With
    act_order columns go by falling diagonal of H and groups keep their ranges from the start.
    """
    weight, hessian = weight.detach().float().clone(), hessian.clone()
    dead = torch.diagonal(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    start = rtn(weight, format, config)
    width = weight.shape[1]
    order = torch.arange(width, device=weight.device)
    if config.act_order:
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order], config.percdamp)
    live_ranges = start.groups > 1 and not config.act_order
    levels, scale, zero = _sweep(
        weight[:, order], inverse, order, start, format, config, live_ranges
    )
    back = torch.argsort(order)
    return QuantizedWeight(levels[:, back].to(torch.int16), scale, zero, start.grid)


def _inverse_factor(hessian: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped H's inverse."""
    damp = percdamp * torch.diagonal(hessian).mean()
    damped = hessian + damp * torch.eye(hessian.shape[0], device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _sweep(
    weight: torch.Tensor,
    inverse: torch.Tensor,
    order: torch.Tensor,
    start: QuantizedWeight,
    format: TensorQuant,
    config: WeightsConfig,
    live_ranges: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round the (ordered) columns block by block; return levels, scale (out, groups), zero."""
    scale, zero = start.scale.clone(), start.zero.clone()
    levels = torch.zeros_like(weight)
    width, size = weight.shape[1], weight.shape[1] // start.groups
    grid = start.grid
    for begin in range(0, width, config.block_size):
        end = min(begin + config.block_size, width)
        errors = torch.zeros_like(weight[:, begin:end])
        for column in range(begin, end):
            group = int(order[column]) // size
            if live_ranges and column % size == 0:
                # lazily updated columns beyond this block are brought up to date first
                ahead = weight[:, column : column + size].clone()
                done = errors[:, : column - begin]
                if column + size > end:
                    ahead[:, end - column :] -= done @ inverse[begin:column, end : column + size]
                scale[:, group : group + 1], zero[:, group : group + 1] = _range(
                    ahead, format, config
                )
            s, z = scale[:, group], zero[:, group]
            w = weight[:, column]
            levels[:, column] = encode(w, s, z, grid)
            error = (w - decode(levels[:, column], s, z, grid)) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return levels, scale, zero


def _range(
    columns: torch.Tensor, format: TensorQuant, config: WeightsConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero (out, 1) of one group of columns, with its clip search."""
    clip = search_ratios(columns, replace(format, group_size=0), config)[:, 0]
    _, lowest, highest = extremes(columns, 0)
    return scale_and_zero(lowest[:, 0] * clip, highest[:, 0] * clip, weight_grid(format))
