"""The integer format in one pass over memory, there and back and its gradient, for CUDA.

`spinlab.formats.integer` and `spinlab.formats.gradient` are the definition: kernels give the same
values bit for bit (exact division, rounding to even, no fused multiply-add), and gradients of
finite numbers that differ only in the order of their sums. Above 12 bits float32 has no room for
parts of levels, and what is next to a tie may differ by a level.
"""

from typing import Any

import torch

from spinlab.formats.integer import IntegerFormat

_TILE = 4096  # numbers that one program rounds
_BACKWARD_TILE = 2048  # and pulls back: it holds more of each, 8 to a thread fit into registers


def has_kernel(x: torch.Tensor) -> bool:
    """Tell whether there are kernels for x; other devices and float64 go through torch."""
    return x.is_cuda and x.dtype != torch.float64


def round_rows(
    x: torch.Tensor,
    format: IntegerFormat,
    group_size: int,
    clip_ratio: float | torch.Tensor,
    error: bool = False,
) -> torch.Tensor:
    """Return Q(x), or Q(x) - x with `error`, per group of the last dimension, in x's dtype.

    x: (..., C); group_size divides C, 0 means C. clip_ratio: a number, or a tensor of no dimensions
    on x's device, which is not waited for.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    width, rows, block, step = _tiles(x, group_size, _TILE)
    ratio, known = ratio_of(clip_ratio)
    if x.numel():
        from spinlab.formats.integer_kernels import round_kernel  # Triton loads where it is used

        launch: Any = round_kernel[(_ceil(rows, step),)]
        launch(
            x, out, rows, ratio, WIDTH=width, BLOCK=block,
            STEP=step, LOW=format.lowest, HIGH=format.highest, SYMMETRIC=format.symmetric,
            KNOWN=known, HALF=format.half_scale, ERROR=error,
            num_warps=4 if step * block <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def encode_rows(
    x: torch.Tensor,
    format: IntegerFormat,
    group_size: int,
    clip_ratio: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the levels of x as bytes from 0 on, (..., C/g, g), and scale and zero (..., C/g, 1).

    Arguments are those of `round_rows`, of a format that is_int8. Levels are uint8, scales float32,
    zero points int32. A row that holds what is no number has the scale NaN.
    """
    x = x.contiguous()
    width, rows, block, step = _tiles(x, group_size, _TILE)
    levels, scale, zero = room_for_levels(x, width)
    ratio, known = ratio_of(clip_ratio)
    if x.numel():
        from spinlab.formats.integer_kernels import encode_kernel

        launch: Any = encode_kernel[(_ceil(rows, step),)]
        launch(
            x, levels, scale, zero, rows, ratio, WIDTH=width,
            BLOCK=block, STEP=step, LOW=format.lowest, HIGH=format.highest,
            SYMMETRIC=format.symmetric, KNOWN=known, HALF=format.half_scale,
            num_warps=4 if step * block <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return levels, scale, zero


def ratio_of(clip_ratio: float | torch.Tensor) -> tuple[float | torch.Tensor, bool]:
    """Return a clip ratio as kernels take it, and whether it is a number: they read a tensor."""
    if isinstance(clip_ratio, torch.Tensor):
        return clip_ratio.float(), False
    return clip_ratio, True


def room_for_levels(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a kernel fills with the levels, scales and zero points of groups of x."""
    levels = torch.empty_like(x, dtype=torch.uint8).unflatten(-1, (-1, width))
    scale = torch.empty_like(levels[..., :1], dtype=torch.float32)
    return levels, scale, torch.empty_like(scale, dtype=torch.int32)


def pull_back_rows(
    x: torch.Tensor,
    gradient: torch.Tensor,
    ratio: torch.Tensor,
    format: IntegerFormat,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `spinlab.formats.gradient.pull_back` does, with one ratio and rounded as `settled`.

    The second result, float32, adds up to the gradient of the log ratio.
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    width, rows, block, step = _tiles(x, group_size, _BACKWARD_TILE)
    sums = x.new_zeros(_ceil(rows, step), dtype=torch.float32)
    if x.numel():
        from spinlab.formats.integer_kernels import pull_back_kernel

        launch: Any = pull_back_kernel[(len(sums),)]
        launch(
            x, gradient, ratio.float(), out, sums, rows, WIDTH=width, BLOCK=block, STEP=step,
            LOW=format.lowest, HIGH=format.highest, SYMMETRIC=format.symmetric,
            HALF=format.half_scale, num_warps=min(step * block // 256, 32), enable_fp_fusion=False,
        )  # fmt: skip
    return out, sums


def _tiles(x: torch.Tensor, group_size: int, tile: int) -> tuple[int, int, int, int]:
    """Return the width and number of groups, the width's power of two, and groups per program."""
    width = group_size or x.shape[-1]
    block = 1 << (width - 1).bit_length()
    return width, x.numel() // width, block, max(1, tile // block)


def _ceil(number: int, parts: int) -> int:
    return (number + parts - 1) // parts
