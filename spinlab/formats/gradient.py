"""A round trip through an integer grid whose range can learn: LSQ's gradient for dynamic ranges.

Plain straight-through gradients never tell a clip ratio, or what comes before a quantizer, that a
smaller range is better. Here the rounding is differentiated as in LSQ (Esser et al. 2020): inside
the range it passes the gradient straight through, outside it passes none; the range, ratio times
the extremes of a token's group, gets the rest and hands it on to the ratio and to the extremes.
The zero point counts as exact.
"""

import torch

from spinlab.formats.integer import Grid, at_least_float32, extremes, scale_and_zero, settled
from spinlab.formats.integer_triton import has_kernel, pull_back_rows
from spinlab.formats.quantizer import TokenQuantizer

_CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}


def round_in_range(
    x: torch.Tensor, log_ratio: torch.Tensor, grid: Grid, group_size: int = 0
) -> torch.Tensor:
    """Quantize and dequantize x: (..., C), with a gradient for x and for the log of a clip ratio.

    The values are those of a `TokenQuantizer` with this ratio. log_ratio: a tensor of no dimensions
    on x's device.
    """
    return RoundInRange.apply(x, log_ratio, grid, group_size)  # type: ignore[no-any-return]


class RoundInRange(torch.autograd.Function):
    """Round forward, pull back by LSQ; keeps x for that, where straight-through keeps nothing."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, log_ratio: torch.Tensor, grid: Grid, group_size: int):
        ratio = log_ratio.exp()
        ctx.save_for_backward(x, ratio)
        ctx.grid, ctx.group_size = grid, group_size
        return TokenQuantizer(grid, group_size, ratio).round_trip(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, ratio = ctx.saved_tensors
        work = pull_back_rows if has_kernel(x) else pull_back
        of_x, of_log = work(x, gradient, ratio, ctx.grid, ctx.group_size)
        return of_x, of_log.to(ratio.dtype), None, None


def pull_back(
    x: torch.Tensor, gradient: torch.Tensor, ratio: torch.Tensor, grid: Grid, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the gradient of Q(x) into those of x: (..., C), in its dtype, and of the log ratio.

    The latter is summed over all groups. Entries that share an extreme share its part evenly.
    """
    width = group_size or x.shape[-1]
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    step = max(1, _CHUNK_ELEMENTS[x.device.type] // width)
    parts = zip(x.reshape(-1, width).split(step), wide.reshape(-1, width).split(step), strict=True)
    found = [_pull_back(*part, ratio, grid) for part in parts]
    of_x, of_log = (list(results) for results in zip(*found, strict=True))
    return torch.cat(of_x).view_as(x), torch.stack(of_log).sum()


def _pull_back(
    x: torch.Tensor, gradient: torch.Tensor, ratio: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do it for groups (n, width)."""
    wide, lowest, highest = (t.squeeze(1) for t in extremes(at_least_float32(x), 0))
    scale, zero = scale_and_zero(lowest * ratio, highest * ratio, grid)
    exact, levels = wide / scale, settled(wide, scale)
    # +1 above the range, -1 below it, 0 inside; comparisons cost many times as much on a CPU
    side = (levels - levels.clamp(grid.lowest - zero, grid.highest - zero)).clamp_(-1, 1)
    signed = gradient * side
    outside = signed * side
    passed, total, balance = gradient - outside, _sum(outside), _sum(signed)
    above, below = (total + balance) / 2, (total - balance) / 2
    of_scale = _sum(levels.sub_(exact).mul_(passed))
    if grid.symmetric:
        of_peak = (of_scale + grid.highest * above + grid.lowest * below) * ratio / grid.highest
        up = (highest >= -lowest).to(of_peak.dtype)
        of_highest, of_lowest = of_peak * up, of_peak * (up - 1)
    else:
        of_highest = (above + of_scale / grid.highest) * ratio * (highest > 0)
        of_lowest = (below - of_scale / grid.highest) * ratio * (lowest < 0)
    for of_extreme, extreme in ((of_highest, highest), (of_lowest, lowest)):
        at = (wide - extreme).sign_().abs_().neg_().add_(1)
        passed.addcmul_(at, of_extreme / _sum(at))
    return passed.to(x.dtype), (of_highest * highest + of_lowest * lowest).sum()


def _sum(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(-1, keepdim=True)
