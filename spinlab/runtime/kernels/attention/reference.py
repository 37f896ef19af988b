"""The definition of decode attention over packed rows."""

import torch

from spinlab.kv.bias import BiasScores, waves_of
from spinlab.runtime.kernels.kv.floats import FloatTokens
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize


def attend(
    query: torch.Tensor,
    keys: PackedRows,
    values: PackedRows,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    bias: BiasScores | None = None,
    floats: FloatTokens | None = None,
) -> torch.Tensor:
    """Attend from one token of each sequence to the slots start..length-1.

    query: (batch, heads, 1, head_dim), heads a multiple of kv_heads, turned as the keys are.
    start: (batch,) int32, the first slot that holds a token; length: (1,) int64, the filled slots.
    bias: what a bias of the keys, which the rows do not hold, adds to scores at the slots.
    floats: of the first and the newest of these slots, whose rows are not read where it is given.
    Returns (batch, heads, 1, head_dim) in the query's dtype; zeros where there is no slot.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    slots, valid = _coded(start, length, keys.capacity, floats)
    k, v = (dequantize(rows, keys.capacity, wide) for rows in (keys, values))
    if floats is not None:
        kept, there = floats.slots(length)
        slots, valid = torch.cat((slots, kept), 1), torch.cat((valid, there), 1)
        k, v = (
            torch.cat((rows, x.to(wide)), 2) for rows, x in zip((k, v), floats.tensors, strict=True)
        )
    valid = valid[:, None, :, None]
    k, v = (x.masked_fill_(~valid, 0) for x in (k, v))
    grouped = query.to(wide).flatten(1, 2).unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.mT
    if bias is not None:
        waves = waves_of(bias.waves, slots)[:, None]
        scores += bias.vectors.unflatten(1, (k.shape[1], -1)) @ waves.mT
    scores = (scores * scaling).masked_fill_(~valid.mT, -torch.inf)
    weights = scores.softmax(-1).masked_fill_(~valid.any(2, keepdim=True), 0)
    return (weights @ v).flatten(1, 2).unsqueeze(2).to(query.dtype)


def _coded(
    start: torch.Tensor, length: torch.Tensor, capacity: int, floats: FloatTokens | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all slots, and which of them are read as rows hold them: (batch, capacity)."""
    slots = torch.arange(capacity, device=start.device).expand(len(start), -1)
    sinks, window = (0, 0) if floats is None else (floats.sinks, floats.window)
    return slots, (slots >= start[:, None] + sinks) & (slots < length - window)
