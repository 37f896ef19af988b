"""RoPE, R3 and coding of keys and values in one pass over memory, in Triton."""

import torch

from spinlab.config.kv import LENGTHS
from spinlab.kv.layouts import GridLayout, LevelsLayout
from spinlab.rotation.online import OnlineRotation
from spinlab.runtime.kernels.kv.floats import FloatTokens
from spinlab.runtime.kernels.kv.rows import PackedRows
from spinlab.runtime.kernels.launch import compiled_for, launch, power_of_two


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
    """Do what `reference.store` does. float64 is not supported; every R3 is.

    Nothing is read on the host, so that CUDA graphs can hold it once one call has brought R3 to
    the device. Tokens beyond the rows' capacity are not written: whoever counts them must check.
    """
    from spinlab.runtime.kernels.kv.triton import store_kernel  # Triton loads where it is used

    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "heads must be contiguous"
    assert q.dtype == k.dtype == v.dtype and q.dtype.itemsize <= 4, "one dtype, float32 at most"
    (batch, tokens, heads, width), kv_heads = q.shape, k.shape[2]
    # as attention's result should lie, which follows its queries: heads of a token side by side
    queries = q.new_empty(batch, tokens, heads, width).transpose(1, 2)
    shape = (batch, kv_heads, tokens, width) if returned else (0,)
    k_round, v_round = k.new_empty(shape), v.new_empty(shape)
    matrix, scale = (q, 1.0) if r3 is None else r3.whole(q.dtype, q.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    kept, sizes = _floats(floats, k)
    step, warps = _cut(batch * tokens)
    programs = -(-batch * tokens * heads // step) + 2 * -(-batch * tokens * kv_heads // step)
    arguments = (
        q, k, v, cos, sin, matrix, position, queries, *_tensors(keys), k_round, *_tensors(values),
        v_round, *kept, batch, tokens, heads, kv_heads, keys.capacity, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, *sizes, scale,
        _clip(keys), _clip(values),
    )  # fmt: skip
    constants = {
        "D": width, "HALF": max(16, power_of_two(width // 2)), "ROTARY": cos.shape[2], "STEP": step,
        "R3": r3 is not None, **_constants("K", keys), **_constants("V", values),
        "ROUND": returned, "FLOATS": floats is not None, "FUSED": compiled_for(q),
    }  # fmt: skip
    launch(store_kernel, (programs,), arguments, constants, num_warps=warps, enable_fp_fusion=False)
    return (queries, k_round, v_round) if returned else (queries, None, None)


def _floats(
    floats: FloatTokens | None, like: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
    """Return tensors of what stays in floats, how many sinks and how wide a window.

    Without any tensors are anything.
    """
    if floats is None:
        return (like, like, like), (0, 0)
    return (floats.keys, floats.values, floats.start), (floats.sinks, floats.window)


def _cut(tokens: int) -> tuple[int, int]:
    """Return heads per program and warps: few for short waits, many to read R3 less often."""
    return (16, 4) if tokens <= 128 else (64, 4)


def _tensors(rows: PackedRows) -> tuple[torch.Tensor, ...]:
    """Return levels and where they end, nibbles, scales and zero points; anything for what is not.

    The first two are float32.
    """
    layout, zero = rows.layout, rows.scale if rows.zero is None else rows.zero
    levels = between = rows.scale
    if isinstance(layout, LevelsLayout):
        levels, between = (part.like(rows.scale) for part in (layout.levels, layout.between))
    return levels, between, rows.packed, rows.scale, zero


def _clip(rows: PackedRows) -> float:
    return rows.layout.clip_ratio if isinstance(rows.layout, GridLayout) else 1.0


def _constants(side: str, rows: PackedRows) -> dict[str, int]:
    """Return what the kernel knows of keys (K) or values (V): a grid, or how many levels."""
    layout, found = rows.layout, dict.fromkeys(("LOWEST", "HIGHEST", "MANY", "LENGTH"), 0)
    if isinstance(layout, LevelsLayout):
        found |= {"MANY": len(layout.levels.first), "LENGTH": LENGTHS.index(layout.length)}
    else:
        assert isinstance(layout, GridLayout)
        found |= {"LOWEST": layout.grid.lowest, "HIGHEST": layout.grid.highest}
    return {f"{side}_{name}": value for name, value in found.items()}
