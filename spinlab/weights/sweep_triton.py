"""A block of GPTQ's columns in one launch, for integers and small floats on CUDA.

Column by column the sweep is bound by kernel launches, some six a column. Rows of a weight do not
meet, so one program takes a few of them through the whole block, with nothing to wait for.
`Sweep.round_columns` of `spinlab.weights.gptq` is the definition: the steps are the same, in the
same order.
"""

from typing import Any

import torch

from spinlab.formats import Format, IntegerFormat
from spinlab.formats.coded import CodedFloat
from spinlab.formats.float_triton import kind_of
from spinlab.formats.minifloat import GroupFloat

Rounded = IntegerFormat | GroupFloat | CodedFloat
_TILE = 1024  # numbers that one program holds, 32 to a thread of its only warp
_MOST = 512  # columns


def has_kernel(columns: torch.Tensor, format: Format, block: int) -> bool:
    """Tell whether there is a kernel for columns (in, out) that are rounded in blocks of so many.

    Others are rounded by torch.
    """
    known = isinstance(format, Rounded)
    return columns.is_cuda and known and block <= _MOST


def round_columns(
    columns: torch.Tensor,
    levels: torch.Tensor,
    errors: torch.Tensor,
    ranges: tuple[torch.Tensor, torch.Tensor],
    groups: torch.Tensor,
    spread: torch.Tensor,
    format: Rounded,
    extent: tuple[int, int, int],
    first: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
) -> None:
    """Round columns begin..stop, and update those up to end; extent: (begin, stop, end).

    columns: (in, out) float32, overwritten; levels: (in, out) int16 and errors: (stop - begin, out)
    float32 are filled. ranges: scale and zero (groups, out). groups: (in,) int32, which of them is
    a column's. spread: (in, in), R of an ErrorSpread. first and ahead: as `Sweep` takes them.
    """
    begin, stop, end = extent
    block = max(16, 1 << (end - begin - 1).bit_length())
    lanes = max(8, _TILE // block)
    width, outputs = columns.shape
    from spinlab.weights.sweep_kernels import sweep_kernel  # Triton loads where it is used

    launch: Any = sweep_kernel[(-(-outputs // lanes),)]
    launch(
        columns, levels, errors, *ranges, groups, spread, spread if ahead is None else ahead,
        errors if first is None else first, outputs, width, begin, end, COUNT=stop - begin,
        LOW=format.lowest, HIGH=format.highest,
        KIND=None if isinstance(format, IntegerFormat) else kind_of(format),
        FIRST=first is not None, AHEAD=ahead is not None, BLOCK=block, LANES=lanes, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
