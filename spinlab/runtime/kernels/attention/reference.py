"""The definition of decode attention over packed rows."""

import torch

from spinlab.kv.bias import BiasScores
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize


def attend(
    query: torch.Tensor,
    keys: PackedRows,
    values: PackedRows,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    bias: BiasScores | None = None,
) -> torch.Tensor:
    """Attend from one token of each sequence to the slots start..length-1.

    query: (batch, heads, 1, head_dim), heads a multiple of kv_heads, turned as the keys are.
    start: (batch,) int32, the first slot that holds a token; length: (1,) int64, the filled slots.
    bias: what a bias of the keys, which the rows do not hold, adds to scores at the slots.
    Returns (batch, heads, 1, head_dim) in the query's dtype; zeros where there is no slot.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    slots = torch.arange(keys.capacity, device=query.device)
    valid = ((slots >= start[:, None]) & (slots < length))[:, None, :, None]
    k, v = (
        dequantize(rows, keys.capacity, wide).masked_fill_(~valid, 0) for rows in (keys, values)
    )
    grouped = query.to(wide).flatten(1, 2).unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.mT
    if bias is not None:
        scores += bias.vectors.unflatten(1, (k.shape[1], -1)) @ bias.waves[:, None].mT
    scores = (scores * scaling).masked_fill_(~valid.mT, -torch.inf)
    weights = scores.softmax(-1).masked_fill_(~valid.any(2, keepdim=True), 0)
    return (weights @ v).flatten(1, 2).unsqueeze(2).to(query.dtype)
