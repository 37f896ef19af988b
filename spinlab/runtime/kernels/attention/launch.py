"""Decode attention that reads packed rows, split over the context, in Triton."""

from typing import NamedTuple

import torch

from spinlab.kv.bias import BiasScores
from spinlab.kv.layouts import GridLayout, LevelsLayout
from spinlab.runtime.kernels.kv.rows import PackedRows
from spinlab.runtime.kernels.launch import compiled_for, gpu_of, launch, power_of_two

_RESIDENT = 8  # programs that one multiprocessor runs at a time
_LEAST_SLOTS = 128  # per split; fewer would not pay for the sum over splits
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
    plan: Plan | None = None,
) -> torch.Tensor:
    """Do what `reference.attend` does. float64 is not supported.

    Nothing is read on the host and the launch depends on shapes alone, so that CUDA graphs can
    hold it; the work follows `length` all the same. plan: None takes `plan_of`.
    """
    from spinlab.runtime.kernels.attention.triton import (  # Triton loads where it is used
        attend_kernel,
        combine_kernel,
    )

    assert query.shape[2] == 1 and query.stride(3) == 1, "one token with contiguous heads"
    assert query.dtype.itemsize <= 4, "kernels compute in float32 at most"
    batch, heads, _, width = query.shape
    kv_heads = keys.packed.shape[1]
    group = heads // kv_heads
    columns = 8 if group <= 8 else 16
    owners = batch * kv_heads * -(-group // columns)
    block, splits, warps, stages = plan or plan_of(owners, keys.capacity, query.device)
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    sums = query.new_empty(batch * heads, splits, width if splits > 1 else 0, dtype=torch.float32)
    most, total = query.new_empty(2, batch * heads, splits, dtype=torch.float32)
    of_bias, wave_batch, rotary_dim = _of_bias(bias, query)
    arguments = (
        query, *_tensors(keys), *_tensors(values), start, length, sums, most, total, out, *of_bias,
        scaling * _LOG2_E, keys.capacity, splits, kv_heads, query.stride(0), query.stride(1),
        wave_batch,
    )  # fmt: skip
    constants = {
        "GROUP": group,
        "HEADS": columns,
        "D": width,
        "PAIRS": max(16, power_of_two(width // 4)),
        "BLOCK": block,
        "WHOLE": splits == 1,
        "K_MIDDLE": _middle(keys),
        "V_MIDDLE": _middle(values),
        "K_LEVELS": _levels(keys),
        "V_LEVELS": _levels(values),
        "WIDE": query.dtype == torch.float32,
        "EVEN": keys.capacity % block == 0,
        "FAST": compiled_for(query),
        "ROTARY": rotary_dim,
        "WAVES": max(16, power_of_two(rotary_dim // 2)) if rotary_dim else 0,
    }
    grid = (owners, splits)
    launch(attend_kernel, grid, arguments, constants, num_warps=warps, num_stages=stages)
    if splits > 1:
        arguments = (sums, most, total, out, splits)
        constants = {"D": width, "BLOCK_D": power_of_two(width), "BLOCK": power_of_two(splits)}
        launch(combine_kernel, (batch * heads,), arguments, constants, num_warps=4)
    return out


def _of_bias(
    bias: BiasScores | None, query: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], int, int]:
    """Return vectors and waves, how far those of two sequences are apart, and rotary_dim.

    Without a bias tensors are anything and numbers 0.
    """
    if bias is None:
        return (query, query), 0, 0
    vectors, waves = (part.contiguous() for part in bias)
    assert vectors.dtype == waves.dtype == torch.float32, "kernels compute in float32"
    return (vectors, waves), waves.stride(0) if len(waves) > 1 else 0, waves.shape[2]


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
