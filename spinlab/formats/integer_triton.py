"""A round trip through an integer grid in one pass over memory, and its gradient, for CUDA.

The torch functions of `spinlab.formats.integer` and `spinlab.formats.gradient` are the definition:
kernel and definition give the same values bit for bit (exact division, rounding to even, no fused
multiply-add), and gradients that differ only in the order of their sums. Above 12 bits float32 has
no room for parts of levels, and what is next to a tie may differ by a level.
"""

from typing import Any

import torch

from spinlab.formats.integer import SMALLEST_HALF, SMALLEST_SCALE, Grid

_TILE = 4096  # numbers that one program rounds
_BACKWARD_TILE = 2048  # and pulls back: it holds more of each, 8 to a thread fit into registers


def has_kernel(x: torch.Tensor) -> bool:
    """Tell whether there are kernels for x; other devices and float64 go through torch."""
    return x.is_cuda and x.dtype != torch.float64


def round_rows(
    x: torch.Tensor,
    grid: Grid,
    group_size: int,
    clip_ratio: float | torch.Tensor,
    half_scale: bool = False,
    error: bool = False,
) -> torch.Tensor:
    """Return Q(x), or Q(x) - x with `error`, per group of the last dimension, in x's dtype.

    x: (..., C); group_size divides C, 0 means C. clip_ratio: a number, or a tensor of no dimensions
    on x's device, which is not waited for. half_scale: the scale is rounded to float16 as the KV
    codec stores it.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    width, rows, block, step = _tiles(x, group_size, _TILE)
    known = not isinstance(clip_ratio, torch.Tensor)
    if x.numel():
        from spinlab.formats.integer_kernels import round_kernel  # Triton loads where it is used

        launch: Any = round_kernel[(_ceil(rows, step),)]
        launch(
            x, out, rows, clip_ratio if known else clip_ratio.float(), WIDTH=width, BLOCK=block,
            STEP=step, LOW=grid.lowest, HIGH=grid.highest, SYMMETRIC=grid.symmetric, KNOWN=known,
            HALF=half_scale, ERROR=error, FLOOR=SMALLEST_SCALE, HALF_FLOOR=SMALLEST_HALF,
            num_warps=4 if step * block <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def pull_back_rows(
    x: torch.Tensor, gradient: torch.Tensor, ratio: torch.Tensor, grid: Grid, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `spinlab.formats.gradient.pull_back` does; the second result is float32."""
    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    width, rows, block, step = _tiles(x, group_size, _BACKWARD_TILE)
    sums = x.new_zeros(_ceil(rows, step), dtype=torch.float32)
    if x.numel():
        from spinlab.formats.integer_kernels import pull_back_kernel

        launch: Any = pull_back_kernel[(len(sums),)]
        launch(
            x, gradient, ratio.float(), out, sums, rows, WIDTH=width, BLOCK=block, STEP=step,
            LOW=grid.lowest, HIGH=grid.highest, SYMMETRIC=grid.symmetric,
            FLOOR=SMALLEST_SCALE, num_warps=min(step * block // 256, 32),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, sums.sum()


def _tiles(x: torch.Tensor, group_size: int, tile: int) -> tuple[int, int, int, int]:
    """Return the width and number of groups, the width's power of two, and groups per program."""
    width = group_size or x.shape[-1]
    block = 1 << (width - 1).bit_length()
    return width, x.numel() // width, block, max(1, tile // block)


def _ceil(number: int, parts: int) -> int:
    return (number + parts - 1) // parts
