"""The definition of what happens to queries, keys and values between projection and attention."""

import torch

from spinlab.formats.pack import pack_levels
from spinlab.kv.base import PackedLayout
from spinlab.kv.rope import rotary
from spinlab.rotation.online import OnlineRotation
from spinlab.runtime.kernels.kv.floats import FloatTokens
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize


def store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    r3: OnlineRotation | None,
    keys: PackedRows,
    values: PackedRows,
    position: torch.Tensor,
    returned: bool,
    floats: FloatTokens | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Turn queries and keys by RoPE and R3, and write coded keys and values, in place.

    q: (batch, tokens, heads, head_dim); k, v: (batch, tokens, kv_heads, head_dim), all in one
    dtype, the last dimension contiguous. cos, sin: (batch or 1, tokens, rotary_dim), in the same
    dtype; what lies beyond rotary_dim does not turn. position: (1,) int64, the slot of the first
    token; all tokens must fit into the rows. floats: of the layer's sinks and newest tokens, where
    it has such; they are written, too.
    Returns the queries (batch, heads, tokens, head_dim) and, if `returned`, keys and values as the
    rows hold them, or with `floats` as they were coded: (batch, kv_heads, tokens, head_dim).
    """
    queries, rotated = (rotary(x.transpose(1, 2), cos, sin) for x in (q, k))
    if r3 is not None:
        queries, rotated = r3(queries), r3(rotated)
    new = rotated, v.transpose(1, 2)
    found = [_write(rows, x, position) for rows, x in zip((keys, values), new, strict=True)]
    if floats is not None:
        floats.write(*new, position)
        found = [x.contiguous() for x in new]
    queries = queries.contiguous()
    return (queries, found[0], found[1]) if returned else (queries, None, None)


def _write(rows: PackedRows, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Code x: (batch, kv_heads, tokens, head_dim) into its slots and return what they hold."""
    new = _coded(x, rows.layout)
    slots = position + torch.arange(x.shape[2], device=x.device)
    rows.packed.index_copy_(2, slots, new.packed)
    rows.scale.index_copy_(2, slots, new.scale)
    if rows.zero is not None and new.zero is not None:
        rows.zero.index_copy_(2, slots, new.zero)
    return dequantize(new, x.shape[2], x.dtype)


def _coded(x: torch.Tensor, layout: PackedLayout) -> PackedRows:
    nibbles, scale, zero = layout.encode(x)
    return PackedRows(pack_levels(nibbles, 4, 0), scale, zero, layout)
