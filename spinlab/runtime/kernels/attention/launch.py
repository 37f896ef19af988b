"""Decode attention that reads packed rows, split over the context, in Triton."""

from typing import Any, NamedTuple

import torch

from spinlab.kv.bias import BiasScores
from spinlab.kv.layouts import GridLayout, LevelsLayout
from spinlab.runtime.kernels.kv.floats import FloatTokens
from spinlab.runtime.kernels.kv.rows import PackedRows
from spinlab.runtime.kernels.launch import compiled_for, gpu_of, launch, power_of_two

_RESIDENT = 8  # programs that one multiprocessor runs at a time
_LEAST_SLOTS = 128  # per split; fewer would not pay for the sum over splits
_PLACES = 64  # tokens in floats of 16 bits that a program takes
# fewer than a warpgroup: products of 16 heads would be wgmma, and what Triton 3.6 makes of values
# times weights is wrong there
_FLOATS_WARPS = 2
_LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """Say how the work is cut: slots per turn of the loop, parts of the context, warps, stages."""

    block: int
    splits: int
    warps: int
    stages: int


def attend(
    query: torch.Tensor,
    keys: PackedRows,
    values: PackedRows,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    bias: BiasScores | None = None,
    floats: FloatTokens | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Do what `reference.attend` does. float64 is not supported.

    Nothing is read on the host and the launch depends on shapes alone, so that CUDA graphs can
    hold it; the work follows `length` all the same. plan: None takes `plan_of`.
    """
    from spinlab.runtime.kernels.attention.triton import attend_kernel
    from spinlab.runtime.kernels.attention.triton_floats import floats_kernel

    assert query.shape[2] == 1 and query.stride(3) == 1, "one token with contiguous heads"
    assert query.dtype.itemsize <= 4, "kernels compute in float32 at most"
    heads, kv_heads, width = query.shape[1], keys.packed.shape[1], query.shape[3]
    columns = 8 if heads <= 8 * kv_heads else 16
    owners = len(query) * kv_heads * -(-heads // kv_heads // columns)
    plan = plan or plan_of(owners, keys.capacity, query.device)
    block, blocks = _blocks(floats)
    if blocks:  # so that all parts together are as many as a power of two where they can be
        plan = plan._replace(splits=max(plan.splits - blocks, 1))
    parts = plan.splits + blocks
    found, out = _room(query, parts)
    of_bias, wave_batch, constants = _of_bias(bias, query)
    constants |= {"GROUP": heads // kv_heads, "HEADS": columns, "D": width}
    constants["WIDE"] = query.dtype == torch.float32
    tokens, factor = (start, length), scaling * _LOG2_E
    kept = (0, 0) if floats is None else (floats.sinks, floats.window)
    sizes = *kept, plan.splits, parts, kv_heads, query.stride(0), query.stride(1), wave_batch
    rows = *_tensors(keys), *_tensors(values)
    arguments = query, *rows, *tokens, *found, out, *of_bias, factor, keys.capacity, *sizes
    of_rows = {**constants, **_of_rows(keys, values, plan.block), "WHOLE": parts == 1}
    of_rows["FAST"] = compiled_for(query)
    how: dict[str, Any] = {"num_warps": plan.warps, "num_stages": plan.stages}
    launch(attend_kernel, (owners, plan.splits), arguments, of_rows, **how)
    if floats is not None:
        arguments = query, *floats.tensors, *tokens, *found, *of_bias, factor, *sizes
        constants |= {"BLOCK_D": max(16, power_of_two(width)), "BLOCK": block}
        launch(floats_kernel, (owners, blocks), arguments, constants, num_warps=_FLOATS_WARPS)
    if parts > 1:
        _add(found, out)
    return out


def _room(query: torch.Tensor, parts: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return room for the sums, maxima and totals of parts of each head's work, and the result."""
    batch, heads, _, width = query.shape
    sums = query.new_empty(batch * heads, parts, width if parts > 1 else 0, dtype=torch.float32)
    most, total = query.new_empty(2, batch * heads, parts, dtype=torch.float32)
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    return (sums, most, total), out


def _add(found: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    """Put what parts found together, in place."""
    from spinlab.runtime.kernels.attention.triton import combine_kernel

    rows, parts, width = found[0].shape
    constants = {"D": width, "BLOCK_D": power_of_two(width), "BLOCK": power_of_two(parts)}
    launch(combine_kernel, (rows,), (*found, out, parts), constants, num_warps=_adding(parts))


def _blocks(floats: FloatTokens | None) -> tuple[int, int]:
    """Return how many tokens in floats a program takes, a power of two, and how many programs."""
    if floats is None:
        return 0, 0
    places, most = floats.keys.shape[2], _PLACES // (floats.keys.dtype.itemsize // 2)
    block = max(16, min(most, power_of_two(places)))
    return block, -(-places // block)


def _adding(parts: int) -> int:
    """Return the warps of a program that adds so many parts: it holds all of them at once."""
    return 4 if parts <= 128 else 8


def _of_rows(keys: PackedRows, values: PackedRows, block: int) -> dict[str, Any]:
    """Return what the kernel knows of rows, of which it takes so many at a turn."""
    return {
        "PAIRS": max(16, power_of_two(keys.head_dim // 4)),
        "BLOCK": block,
        "K_MIDDLE": _middle(keys),
        "V_MIDDLE": _middle(values),
        "K_LEVELS": _levels(keys),
        "V_LEVELS": _levels(values),
        "EVEN": keys.capacity % block == 0,
    }


def _of_bias(
    bias: BiasScores | None, query: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], int, dict[str, Any]]:
    """Return vectors and waves, how far those of two sequences are apart, and constants.

    Without a bias tensors are anything and numbers 0.
    """
    if bias is None:
        return (query, query), 0, {"ROTARY": 0, "WAVES": 0}
    vectors, waves = (part.contiguous() for part in bias)
    assert vectors.dtype == waves.dtype == torch.float32, "kernels compute in float32"
    rotary_dim, wave_batch = waves.shape[2], waves.stride(0) if len(waves) > 1 else 0
    constants = {"ROTARY": rotary_dim, "WAVES": max(16, power_of_two(rotary_dim // 2))}
    return (vectors, waves), wave_batch, constants


def plan_of(owners: int, capacity: int, device: torch.device) -> Plan:
    """Choose a plan that fills the device once with programs, for so many pairs of KV heads."""
    wanted = min(_RESIDENT * gpu_of(device).multiprocessors // owners, capacity // _LEAST_SLOTS)
    splits = 1 << (max(wanted, 1).bit_length() - 1)
    return Plan(block=64, splits=splits, warps=2, stages=3)


def _tensors(rows: PackedRows) -> tuple[torch.Tensor, ...]:
    """Return levels, pairs of bytes, scales and zero points; where there are none, anything."""
    layout, zero = rows.layout, rows.scale if rows.zero is None else rows.zero
    levels = layout.levels.like(rows.scale) if isinstance(layout, LevelsLayout) else rows.scale
    return levels, rows.packed.view(torch.uint16), rows.scale, zero


def _middle(rows: PackedRows) -> int:
    """Return the nibble of the number 0 where none is stored, else -1; levels begin at 0."""
    if isinstance(rows.layout, GridLayout):
        return -1 if rows.layout.has_zero else rows.layout.middle
    return 0


def _levels(rows: PackedRows) -> int:
    """Return how many levels nibbles name; 0 where they lie on a grid."""
    return len(rows.layout.levels.first) if isinstance(rows.layout, LevelsLayout) else 0
