"""GPTQ: round column by column, spreading each error over the columns still to come.

Frantar et al. 2022, with Cholesky reformulation (sec. 3.3, step 3) and lazy batches (step 2). On a
GPU the sweep over columns is bound by kernel launches: weights lie transposed, a column is one
contiguous run, nothing asks the device back, and `sweep_triton` takes a block in one launch.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, cast

import torch

from spinlab import parallel
from spinlab.config import GPTQConfig, TensorQuant, WeightsConfig
from spinlab.errors import InputError
from spinlab.finite import check_finite
from spinlab.formats import Parameters, format_of
from spinlab.formats.integer import nearest
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import search_range
from spinlab.weights.sweep_triton import Rounded, has_kernel, round_columns


class NoRows(Exception):
    """Tell that a linear was given no calibration token, as an expert may be."""


class Moment:
    """Gather 2/n Σ yᵀx over pairs of input rows of a linear, in float32 with TF32 off.

    With y = x it is the Hessian H.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add rows y and x: (..., width) each."""
        left, right = (rows.detach().flatten(0, -2).float() for rows in (y, x))
        self.sum.addmm_(left.mT, right)
        self.rows += right.shape[0]

    def value(self) -> torch.Tensor:
        """Return the moment of the rows that all processes have added; raise NoRows for none."""
        rows = int(parallel.sum_(torch.tensor(self.rows)))
        if not rows:
            raise NoRows
        return parallel.sum_(self.sum * (2 / rows))


@dataclass(frozen=True)
class ErrorSpread:
    """What a sweep needs to know of a Hessian; it serves all weights that read the same inputs.

    order: (in,) the columns as they are rounded; dead: (in,) those without any input.
    rows, R: (in, in) float32, in that order. Row c tells how the error of column c is spread over
    the later ones: the upper Cholesky factor of H⁻¹, every row divided by its diagonal entry.
    squares, s: (in,) float32, these entries squared, so that H⁻¹ = Rᵀ diag(s) R.
    """

    order: torch.Tensor
    dead: torch.Tensor
    rows: torch.Tensor
    squares: torch.Tensor


def error_spread(hessian: torch.Tensor, config: GPTQConfig) -> ErrorSpread:
    """Damp and factor H (in, in), in float64, twice that at once and no H, if nobody keeps it.

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
    backwards = order.flip(0)
    matrix = hessian[backwards][:, backwards]
    del hessian
    matrix = matrix.double()
    matrix.diagonal().copy_(damped[backwards])
    return ErrorSpread(order, dead, *_spread(matrix, config))


def _spread(matrix: torch.Tensor, config: GPTQConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rows` and `squares` of an ErrorSpread of H, given backwards and overwritten.

    With columns in reverse order H = L Lᵀ. Reversed again, L⁻¹ is upper triangular and
    H⁻¹ = (L⁻¹)ᵀ L⁻¹: it is the factor of the inverse, at the price of one factorization.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise InputError(
            f"the Hessian of a linear's inputs is not positive definite at "
            f"{config.place}.percdamp={config.percdamp}: raise it, or calibrate on more text "
            f"({config.place}.samples)"
        )
    matrix.zero_().diagonal().fill_(1)  # what is solved for is written over what is no longer used
    inverse = matrix.mT  # a symmetric matrix, in the layout that is solved in place
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    entries = inverse.diagonal().clone()
    inverse.div_(entries[:, None])
    rows = inverse.to(torch.float32, memory_format=torch.contiguous_format).flip(0, 1)
    return rows, entries.square_().flip(0).float()


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    spread: ErrorSpread,
    settings: TensorQuant,
    config: WeightsConfig,
    ratios: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight (out, in) so that its outputs on the calibration inputs change least.

    Rows do not meet: weights with the same inputs may be stacked. Columns with no input are set to
    zero. Without groups, or with static ones, the ranges are those of RTN and the two differ in
    rounding only; else a group's range is taken from its columns as updated when it is reached.
    ratios: (out, in/g, 1), those of learned ranges, which stay as they are.
    """
    weight = weight.detach().float().masked_fill(spread.dead, 0)
    ranges = ranges_of(weight, settings, config, ratios)
    return Sweep(weight[:, spread.order], spread, ranges, settings, config).rounded()


class Ranges(NamedTuple):
    """Hold scale and zero of a weight: (out, in/g) each, and its peak (`peak_of`).

    live: groups get theirs when reached.
    """

    parameters: Parameters
    peak: torch.Tensor | None
    live: bool


def ranges_of(
    weight: torch.Tensor, settings: TensorQuant, config: WeightsConfig, ratios: torch.Tensor | None
) -> Ranges:
    """Return the ranges that a sweep over a weight (out, in) begins with.

    ratios: (out, in/g, 1), those of its ranges that are kept, where they are known.
    """
    found, own = search_range(weight, settings, config.clip, ratios), config.by_columns
    assert own is not None
    live = found.parameters.scale.shape[1] > 1 and not own.static_groups and ratios is None
    assert not (live and own.act_order), "act-order does not visit groups in turn"
    return Ranges(*found, live)


class Sweep:
    """Round the columns of one weight; all matrices are transposed: (in, out), (groups, out).

    columns: (out, in) in the order of rounding, what is to be rounded. first: (out,) what the
    first of them is rounded from, if it is not itself; its error counts from the column. ahead:
    (in, in) in that order, how much of a column, as it is when reached, goes to the later ones.
    """

    def __init__(
        self,
        columns: torch.Tensor,
        spread: ErrorSpread,
        ranges: Ranges,
        settings: TensorQuant,
        config: WeightsConfig,
        *,
        first: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> None:
        assert config.by_columns is not None
        self.columns, self.block = columns.T.contiguous(), config.by_columns.block_size
        self.scale, self.zero = (tensor.T.contiguous() for tensor in ranges.parameters)
        self.size, self.live = len(self.columns) // len(self.scale), ranges.live
        groups = spread.order // self.size
        self.group_of, self._groups = groups.tolist(), groups.to(torch.int32)
        self.spread, self.format, self.clip = spread, format_of(settings), config.clip
        self.settings, self.peak = replace(settings, group_size=self.size), ranges.peak
        self.first, self.ahead = first, ahead

    def rounded(self) -> QuantizedWeight:
        """Return the rounded weight, its columns as they lie in the model."""
        levels = self._run()[torch.argsort(self.spread.order)].T.contiguous()
        ranges = self.scale.T.contiguous(), self.zero.T.contiguous()
        return QuantizedWeight(levels, *ranges, self.format)

    def _run(self) -> torch.Tensor:
        """Return the levels, int16, in the order of rounding."""
        levels = torch.empty(self.columns.shape, dtype=torch.int16, device=self.columns.device)
        errors = torch.empty_like(self.columns[: self.block])
        for begin in range(0, len(self.columns), self.block):
            end = min(begin + self.block, len(self.columns))
            done = errors[: end - begin]
            self._round_block(begin, end, levels, done)
            self._pass_on(self.columns[end:], slice(begin, end), slice(end, None), done)
        return levels

    def _round_block(
        self, begin: int, end: int, levels: torch.Tensor, errors: torch.Tensor
    ) -> None:
        """Round columns begin..end: fill in their `levels` and all `errors`, one a column."""
        reached = [c for c in range(begin, end) if self.live and c % self.size == 0]
        for start, stop in pairwise(dict.fromkeys([begin, *reached, end])):
            if start in reached:
                self._take_range(start, end, errors[: start - begin])
            self._round((start, stop, end), levels, errors[start - begin : stop - begin])

    def _round(
        self, extent: tuple[int, int, int], levels: torch.Tensor, errors: torch.Tensor
    ) -> None:
        """Round columns begin..stop, whose ranges are known, and update those up to end.

        extent: (begin, stop, end). levels: (in, out); errors: (stop - begin, out).
        """
        if not has_kernel(self.columns, self.format, self.block):
            return self.round_columns(extent, levels, errors)
        ranges, format = (self.scale, self.zero), cast(Rounded, self.format)
        spread, groups = self.spread.rows, self._groups
        known = (ranges, groups, spread, format, extent, self.first, self.ahead)
        return round_columns(self.columns, levels, errors, *known)

    def round_columns(
        self, extent: tuple[int, int, int], levels: torch.Tensor, errors: torch.Tensor
    ) -> None:
        """Do what `_round` says, column by column."""
        begin, stop, end = extent
        scales, zeros = self.scale.unbind(), self.zero.unbind()
        for column, error in zip(range(begin, stop), errors.unbind(), strict=True):
            exact, later = self.columns[column], slice(column + 1, end)
            aim = exact if column or self.first is None else self.first
            parameters = Parameters(scales[self.group_of[column]], zeros[self.group_of[column]])
            found = self.format.encode(aim, parameters, nearest)
            levels[column] = found
            torch.sub(exact, self.format.decode(found, parameters), out=error)
            self.columns[later].addr_(self.spread.rows[column, later], error, alpha=-1)
            if self.ahead is not None:
                self.columns[later].addr_(self.ahead[column, later], exact)

    def _pass_on(
        self, target: torch.Tensor, done: slice, later: slice, errors: torch.Tensor
    ) -> None:
        """Add to `target`, the columns `later`, what the columns `done` leave to them."""
        target.addmm_(self.spread.rows[done, later].mT, errors, alpha=-1)
        if self.ahead is not None:
            target.addmm_(self.ahead[done, later].mT, self.columns[done])

    def _take_range(self, column: int, end: int, errors: torch.Tensor) -> None:
        """Set the range of the group that begins at a column from the columns as they stand.

        errors: those of the block before this column. Columns beyond the block wait for them.
        """
        stop = column + self.size
        ahead = self.columns[column:stop].clone()
        if stop > end:
            done = slice(column - errors.shape[0], column)
            self._pass_on(ahead[end - column :], done, slice(end, stop), errors)
        part = ahead.T.contiguous()
        (scale, zero), _ = search_range(part, self.settings, self.clip, peak=self.peak)
        group = self.group_of[column]
        self.scale[group], self.zero[group] = scale[:, 0], zero[:, 0]
