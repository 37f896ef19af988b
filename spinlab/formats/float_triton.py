"""Floats of 4 to 8 bits in one pass over memory, there and back and their gradient, for CUDA.

The formats themselves (`spinlab.formats.minifloat`) and `spinlab.formats.gradient` are the
definition, of some forty to a hundred operations: kernels give the same values bit for bit (exact
division, rounding to even, no fused multiply-add, errors of two scales added up in one order), and
gradients that differ only in the order of their sums. What a token shares needs its largest
magnitude first: a program reads its tokens twice, the second time from a cache.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from spinlab.formats.coded import CodedFloat
from spinlab.formats.integer_triton import ratio_of, room_for_levels
from spinlab.formats.microscaling import Microscaled
from spinlab.formats.minifloat import GroupFloat, ScaledFloat
from spinlab.formats.nvfp4 import NVFP4

_TILE = 1024  # numbers that a program holds at once, 8 to a thread
_PIECE = 16  # of a token that is one group
_WASTE = 8  # one number in so many may be none


class Kind(NamedTuple):
    """Hold what kernels know of a format: see `ScaledFloat`, `Microscaled` and `NVFP4`.

    powers: scales are powers of two. first, other: the rules for scales, of which `other` is taken
    where its error is smaller. most: None where groups know no scale of a tensor. shares: groups
    depend on their token, whose largest magnitude is looked for unless it is `given`. places: what
    levels are of floats, as those of a `CodedFloat`.
    """

    mantissa: int
    smallest: int
    last: int
    top: float
    powers: bool = False
    first: float | None = None
    other: float | None = None
    most: float | None = None
    of_nothing: float = 0.0
    shares: bool = False
    given: bool = False
    places: bool = False


class Tile(NamedTuple):
    """Say how programs walk through tokens of `width` numbers, in `count` groups of `group`.

    A row has room for a power of two of numbers, `block`, that can be halved so often. A program
    has `step` tokens and takes `many` groups of each at a time.
    """

    width: int
    group: int
    count: int
    block: int
    halvings: int
    many: int
    step: int


def round_rows(
    x: torch.Tensor,
    format: ScaledFloat,
    group_size: int,
    clip_ratio: float | torch.Tensor,
    error: bool = False,
    peak: float | None = None,
) -> torch.Tensor:
    """Return Q(x), or Q(x) - x with `error`, per group of the last dimension, in x's dtype.

    x: (..., C); group_size divides C, 0 means C. clip_ratio: a number, or a tensor of no dimensions
    on x's device, which is not waited for. peak: that of a `TokenQuantizer`, for formats that are
    `of_tensor`.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    kind, tile = kind_of(format, peak is not None), tile_of(x, format, group_size)
    ratio, known = ratio_of(clip_ratio)
    if x.numel():
        from spinlab.formats.float_kernels import round_kernel  # Triton loads where it is used

        tokens = x.numel() // tile.width
        launch: Any = round_kernel[(-(-tokens // tile.step),)]
        launch(
            x, out, tokens, ratio, peak or 0.0, KIND=kind,
            TILE=tile, KNOWN=known, ERROR=error, num_warps=_warps(tile), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def encode_rows(
    x: torch.Tensor,
    format: GroupFloat,
    group_size: int,
    clip_ratio: float | torch.Tensor,
    peak: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the levels of x as bytes from 0 on, (..., C/g, g), and scale and zero (..., C/g, 1).

    Arguments are those of `round_rows`. Levels are uint8, scales float32, zero points int32. Where
    a group, or a token that shares a scale, holds what is no number, its scales are NaN.
    """
    assert isinstance(format, GroupFloat), "only groups have levels that fit into a byte"
    x = x.contiguous()
    kind, tile = kind_of(format, peak is not None), tile_of(x, format, group_size)
    levels, scale, zero = room_for_levels(x, tile.group)
    ratio, known = ratio_of(clip_ratio)
    if x.numel():
        from spinlab.formats.float_kernels import encode_kernel

        tokens = x.numel() // tile.width
        launch: Any = encode_kernel[(-(-tokens // tile.step),)]
        launch(
            x, levels, scale, zero, tokens, ratio,
            peak or 0.0, KIND=kind, TILE=tile, KNOWN=known, num_warps=_warps(tile),
            enable_fp_fusion=False,
        )  # fmt: skip
    return levels, scale, zero


def pull_back_rows(
    x: torch.Tensor,
    gradient: torch.Tensor,
    ratio: torch.Tensor,
    format: ScaledFloat,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `spinlab.formats.gradient.pull_back` does, with one ratio and rounded as `settled`.

    The second result, float32, adds up to the gradient of the log ratio.
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    width = group_size or x.shape[-1]
    kind, tile = kind_of(format)._replace(most=None, shares=False), _tile(width, width)
    tokens = x.numel() // width
    sums = x.new_zeros(-(-tokens // tile.step), dtype=torch.float32)
    if x.numel():
        from spinlab.formats.float_kernels import pull_back_kernel

        launch: Any = pull_back_kernel[(len(sums),)]
        launch(
            x, gradient, ratio.float(), out, sums, tokens, KIND=kind, TILE=tile,
            num_warps=_warps(tile), enable_fp_fusion=False,
        )  # fmt: skip
    return out, sums


@lru_cache(maxsize=256)  # to make it takes the host about as long as a launch
def kind_of(format: ScaledFloat, given: bool = False) -> Kind:
    """Return what kernels know of a format. given: they are told the `peak` of a tensor."""
    kind = Kind(format.mantissa, format.smallest, format.last, float(format.top))
    kind = kind._replace(places=isinstance(format, CodedFloat))
    if isinstance(format, Microscaled):
        first, *others = format.rules
        return kind._replace(powers=True, first=first, other=others[0] if others else None)
    if isinstance(format, NVFP4):
        first, *others = map(float, format.ends)
        kind = kind._replace(first=first, other=others[0] if others else None)
        kind = kind._replace(most=format.most, of_nothing=format.of_nothing)
    return kind._replace(shares=True, given=given)


def tile_of(x: torch.Tensor, format: ScaledFloat, group_size: int) -> Tile:
    """Return how programs walk through x: groups that share nothing are tokens of their own."""
    group = group_size or x.shape[-1]
    if isinstance(format, Microscaled):
        return _tile(group, group)
    return _tile(x.shape[-1], group) if format.of_tensor else _tile(group, _PIECE)


def _tile(width: int, group: int) -> Tile:
    """Choose how many groups a program takes at once: many, but few that are not there."""
    block = 1 << (group - 1).bit_length()
    count = -(-width // group)
    many = max(1, _TILE // block)
    while many > 1 and -count % many * _WASTE > count:
        many //= 2
    step = max(1, _TILE // (block * many))
    return Tile(width, group, count, block, block.bit_length() - 1, many, step)


def _warps(tile: Tile) -> int:
    return max(4, min(tile.block // 256, 32))
