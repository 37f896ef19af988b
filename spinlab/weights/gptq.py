"""GPTQ: round column by column, spreading each error over the columns still to come.

Frantar et al. 2022, with Cholesky reformulation (sec. 3.3, step 3) and lazy batches (step 2). On a
GPU the sweep over columns is bound by kernel launches, so everything in it is laid out for few of
them: weights lie transposed, a column is one contiguous run, and nothing asks the device back.
"""

from dataclasses import dataclass, replace

import torch

from spinlab import parallel
from spinlab.config import GPTQConfig, TensorQuant, WeightsConfig
from spinlab.errors import InputError
from spinlab.finite import check_finite
from spinlab.formats import Parameters, format_of
from spinlab.formats.integer import nearest
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import search_range


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
        """Return H of the rows that all processes have added."""
        rows = int(parallel.sum_(torch.tensor(self.rows)))
        return parallel.sum_(self.sum * (2 / max(rows, 1)))


@dataclass(frozen=True)
class ErrorSpread:
    """What a sweep needs to know of a Hessian; it serves all weights that read the same inputs.

    order: (in,) the columns as they are rounded; dead: (in,) those without any input.
    rows: (in, in) float32, in that order. Row c tells how the error of column c is spread over
    the later ones: the upper Cholesky factor of H⁻¹, every row divided by its diagonal entry.
    """

    order: torch.Tensor
    dead: torch.Tensor
    rows: torch.Tensor


def error_spread(hessian: torch.Tensor, config: GPTQConfig) -> ErrorSpread:
    """Damp and factor H (in, in), in float64.

    Raises InputError where that is impossible, ResultError for an H that is not finite.
    """
    check_finite({"the Hessian": hessian}, "the model is broken, or a linear's inputs overflow")
    diagonal = torch.diagonal(hessian)
    dead = diagonal == 0
    diagonal = diagonal + dead
    order = torch.arange(diagonal.shape[0], device=hessian.device)
    if config.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damped = diagonal + config.percdamp * diagonal.mean()
    return ErrorSpread(order, dead, _spread(hessian, damped, order, config.percdamp))


def _spread(
    hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, percdamp: float
) -> torch.Tensor:
    """Return `ErrorSpread.rows` of H with this diagonal.

    With columns in reverse order H = L Lᵀ. Reversed again, L⁻¹ is upper triangular and
    H⁻¹ = (L⁻¹)ᵀ L⁻¹: it is the factor of the inverse, at the price of one factorization.
    """
    backwards = order.flip(0)
    matrix = hessian[backwards][:, backwards].double()
    matrix.diagonal().copy_(diagonal[backwards])
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise InputError(
            f"the Hessian of a linear's inputs is not positive definite at "
            f"weights.gptq.percdamp={percdamp}: raise it, or calibrate on more text "
            "(weights.gptq.samples)"
        )
    matrix.zero_().diagonal().fill_(1)  # what is solved for is written over what is no longer used
    inverse = matrix.mT  # a symmetric matrix, in the layout that is solved in place
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    inverse.div_(inverse.diagonal().clone()[:, None])
    return inverse.flip(0, 1).to(torch.float32, memory_format=torch.contiguous_format)


@torch.no_grad()
def gptq(
    weight: torch.Tensor, spread: ErrorSpread, settings: TensorQuant, config: WeightsConfig
) -> QuantizedWeight:
    """Quantize a weight (out, in) so that its outputs on the calibration inputs change least.

    Rows do not meet: weights with the same inputs may be stacked. Columns with no input are set to
    zero. Without groups, or with static ones, the ranges are those of RTN and the two differ in
    rounding only; else a group's range is taken from its columns as updated when it is reached.
    """
    weight = weight.detach().float().masked_fill(spread.dead, 0)
    ranges = search_range(weight, settings, config.clip)
    sweep = _Sweep(weight, spread, ranges, settings, config)
    levels = sweep.run()[torch.argsort(spread.order)].T.contiguous()
    return QuantizedWeight(
        levels, sweep.scale.T.contiguous(), sweep.zero.T.contiguous(), sweep.format
    )


class _Sweep:
    """Round the columns of one weight; all matrices are transposed: (in, out), (groups, out)."""

    def __init__(
        self,
        weight: torch.Tensor,
        spread: ErrorSpread,
        ranges: Parameters,
        settings: TensorQuant,
        config: WeightsConfig,
    ) -> None:
        self.columns = weight[:, spread.order].T.contiguous()
        self.scale, self.zero = (tensor.T.contiguous() for tensor in ranges)
        self.rows, self.format, self.config = spread.rows, format_of(settings), config
        self.settings = replace(settings, group_size=0)
        self.size = weight.shape[1] // self.scale.shape[0]
        self.group_of = (spread.order // self.size).tolist()
        self.live = self.scale.shape[0] > 1 and not config.gptq.static_groups
        assert not (self.live and config.gptq.act_order), "act-order does not visit groups in turn"

    def run(self) -> torch.Tensor:
        """Return the levels, int16, in the order of rounding."""
        levels = torch.empty(self.columns.shape, dtype=torch.int16, device=self.columns.device)
        width, block = self.columns.shape[0], self.config.gptq.block_size
        errors = torch.empty_like(self.columns[:block])
        for begin in range(0, width, block):
            end = min(begin + block, width)
            done = errors[: end - begin]
            levels[begin:end] = self._round_block(begin, end, done)
            self.columns[end:].addmm_(self.rows[begin:end, end:].mT, done, alpha=-1)
        return levels

    def _round_block(self, begin: int, end: int, errors: torch.Tensor) -> torch.Tensor:
        """Round columns begin..end, fill in their errors and return their levels."""
        levels: list[torch.Tensor] = []
        scales, zeros = self.scale.unbind(), self.zero.unbind()
        for column, error in zip(range(begin, end), errors.unbind(), strict=True):
            if self.live and column % self.size == 0:
                self._take_range(column, end, errors[: column - begin])
            group, exact = self.group_of[column], self.columns[column]
            parameters = Parameters(scales[group], zeros[group])
            levels.append(self.format.encode(exact, parameters, nearest))
            torch.sub(exact, self.format.decode(levels[-1], parameters), out=error)
            later = self.rows[column, column + 1 : end]
            self.columns[column + 1 : end].addr_(later, error, alpha=-1)
        return torch.stack(levels)

    def _take_range(self, column: int, end: int, errors: torch.Tensor) -> None:
        """Set the range of the group that begins at a column from the columns as they stand.

        errors: those of the block before this column. Columns beyond the block wait for them.
        """
        stop = column + self.size
        ahead = self.columns[column:stop].clone()
        if stop > end:
            begin = column - errors.shape[0]
            ahead[end - column :] -= self.rows[begin:column, end:stop].mT @ errors
        scale, zero = search_range(ahead.T.contiguous(), self.settings, self.config.clip)
        group = self.group_of[column]
        self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]
