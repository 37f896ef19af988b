"""A round trip whose range can learn: LSQ's gradient, for ranges that are a ratio of extremes.

Plain straight-through gradients never tell a clip ratio, or what comes before a quantizer, that a
smaller range is better. Here a format's own gradient (`Format.pull_back`: LSQ, Esser et al. 2020)
goes on from the ends of a range, which are the ratio times the extremes of a group, to the ratio
and to the entries at the extremes.
"""

from itertools import repeat

import torch

from spinlab.formats.base import Format, Rounding
from spinlab.formats.integer import at_least_float32, settled
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.formats.twins import twin_of

_CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}


def round_in_range(
    x: torch.Tensor, log_ratio: torch.Tensor, format: Format, group_size: int = 0
) -> torch.Tensor:
    """Quantize and dequantize x: (..., C), with a gradient for x and for the log of a clip ratio.

    The values are those of a `TokenQuantizer` with this ratio. log_ratio: a tensor of no dimensions
    on x's device.
    """
    return RoundInRange.apply(x, log_ratio, format, group_size)  # type: ignore[no-any-return]


def round_by_range(x: torch.Tensor, quantizer: TokenQuantizer) -> torch.Tensor:
    """Do what a quantizer's round trip does to x: (..., C), with the gradient for x from above.

    Straight-through passes gradients as they are; this one knows what the entries at the extremes
    do to all others of their group.
    """
    ratio = torch.as_tensor(quantizer.clip_ratio, dtype=torch.float64, device=x.device)
    return round_in_range(x, ratio.log(), quantizer.format, quantizer.group_size)


class RoundInRange(torch.autograd.Function):
    """Round forward, pull back by LSQ; keeps x for that, where straight-through keeps nothing."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, log_ratio: torch.Tensor, format: Format, group_size: int):
        ratio = log_ratio.exp()
        ctx.save_for_backward(x, ratio)
        ctx.format, ctx.group_size = format, group_size
        return TokenQuantizer(format, group_size, ratio).round_trip(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, ratio = ctx.saved_tensors
        if pull_back_rows := twin_of(ctx.format, x).pull_back_rows:
            of_x, of_log = pull_back_rows(x, gradient, ratio, ctx.format, ctx.group_size)
        else:
            of_x, of_log = pull_back(x, gradient, ratio, ctx.format, ctx.group_size, settled)
        return of_x, of_log.sum().to(ratio.dtype), None, None


def pull_back(
    x: torch.Tensor,
    gradient: torch.Tensor,
    ratio: torch.Tensor,
    format: Format,
    group_size: int,
    rounding: Rounding,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the gradient of Q(x) into those of x: (..., C), in its dtype, and of the log ratios.

    ratio: of no dimensions, or (..., C/g, 1) with one for each group; the second result is of the
    latter shape. Entries that share an extreme share its part evenly. out: what becomes the first
    result, contiguous; it may be `gradient`.
    """
    width = group_size or x.shape[-1]
    step = max(1, _CHUNK_ELEMENTS[x.device.type] // width)
    found = x.new_empty(x.shape) if out is None else out
    rows = [x.reshape(-1, width), gradient.reshape(-1, width), found.view(-1, width)]
    parts = [t.split(step) for t in rows]
    ratios = ratio.reshape(-1, 1).split(step) if ratio.ndim else repeat(ratio)
    of_logs = []
    for numbers, upstream, of_numbers, clip in zip(*parts, ratios, strict=False):
        of_x, of_log = _pull_back(numbers, upstream, clip, format, rounding)
        of_numbers.copy_(of_x)
        of_logs.append(of_log)
    return found, torch.cat(of_logs).view(*x.shape[:-1], x.shape[-1] // width, 1)


def _pull_back(
    x: torch.Tensor,
    gradient: torch.Tensor,
    ratio: torch.Tensor,
    format: Format,
    rounding: Rounding,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do it for groups (n, width), with ratios (n, 1)."""
    x, gradient = at_least_float32(x), at_least_float32(gradient)
    lowest, highest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    of_x, *of_ends = format.pull_back(x, gradient, lowest * ratio, highest * ratio, rounding)
    of_log, at = torch.zeros_like(lowest), torch.empty_like(x)
    for of_end, extreme in zip(of_ends, (lowest, highest), strict=True):
        of_extreme = of_end * ratio
        torch.eq(x, extreme, out=at)  # in floats, with which a CPU counts faster
        of_x.addcmul_(at, of_extreme / at.sum(-1, keepdim=True))
        of_log.addcmul_(of_extreme, extreme)
    return of_x, of_log
