"""The Triton kernel behind `spinlab.weights.sweep_triton`."""
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false

import triton
import triton.language as tl

from spinlab.formats.float_kernels import clipped, nearest_of, quotient, signed, step_of
from spinlab.formats.float_scales import power
from spinlab.formats.integer_kernels import even


@triton.jit
def _coded(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr):
    """Return the levels of x, and what they stand for, in a format of integers or of KIND."""
    if KIND is None:
        levels = even(tl.math.div_rn(x, scale)) + zero
        levels = tl.minimum(tl.maximum(levels, LOW * 1.0), HIGH * 1.0)
        found = (levels - zero) * scale
    else:
        size = clipped(nearest_of(quotient(x, scale, KIND), KIND), KIND)
        found = signed(size, x) * scale
        if KIND.places:  # behind those of all smaller exponents
            step = step_of(size, KIND)
            before = (step + KIND.mantissa - KIND.smallest) << KIND.mantissa
            size = size * power(-step) + before.to(tl.float32)
        levels = signed(size, x)
    return levels, found


@triton.jit
def sweep_kernel(
    columns_ptr, levels_ptr, errors_ptr, scale_ptr, zero_ptr, group_ptr, spread_ptr, ahead_ptr,
    first_ptr, outputs, width, begin, end, COUNT: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, KIND: tl.constexpr, FIRST: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Round COUNT columns of LANES outputs; the arguments are those of `round_columns`.

    Columns up to `end` lie in registers, BLOCK of them, and no program needs another's.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < outputs
    place = begin + tl.arange(0, BLOCK)
    here = (place < end)[:, None] & inside[None, :]
    where = place.to(tl.int64)[:, None] * outputs + lane[None, :]
    columns = tl.load(columns_ptr + where, mask=here, other=0.0)
    for offset in range(COUNT):
        column = begin + offset
        exact = tl.sum(tl.where((place == column)[:, None], columns, 0.0), 0)
        range_of = tl.load(group_ptr + column) * outputs + lane
        scale = tl.load(scale_ptr + range_of, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + range_of, mask=inside, other=0.0)
        aim = tl.load(first_ptr + lane, mask=inside, other=0.0) if FIRST else exact
        aim = tl.where(column == 0, aim, exact)
        levels, found = _coded(aim, scale, zero, LOW, HIGH, KIND)
        error = exact - found
        out = column.to(tl.int64) * outputs + lane
        tl.store(levels_ptr + out, levels.to(tl.int16), mask=inside)
        tl.store(errors_ptr + offset * outputs + lane, error, mask=inside)
        row = column.to(tl.int64) * width + place
        later = (place > column) & (place < end)
        share = tl.load(spread_ptr + row, mask=later, other=0.0)
        columns -= share[:, None] * error[None, :]
        if AHEAD:
            share = tl.load(ahead_ptr + row, mask=later, other=0.0)
            columns += share[:, None] * exact[None, :]
    tl.store(columns_ptr + where, columns, mask=here)
