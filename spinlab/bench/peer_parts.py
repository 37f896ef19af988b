"""Attention and rotations of other packages beside ours."""

import math
from collections.abc import Callable, Mapping

import torch

from spinlab.bench import kv_decode
from spinlab.bench.operands import QUANTIZER, random_floats
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.fused.operations import Operations

_CLOSE = 0.02  # of the largest output: 4-bit rows are exact, weights and outputs have 16 bits
_HEADER = 4  # bytes of a row that hold a float16 scale and a float16 shift
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _rows(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw rows (..., 4 + head_dim/2) uint8: scale and shift, then nibbles."""
    device, width = generator.device, _HEADER + shape[-1] // 2
    rows = torch.randint(
        256, (*shape[:-1], width), dtype=torch.uint8, generator=generator, device=device
    )
    scale = torch.rand((*shape[:-1], 1), generator=generator, device=device) * 0.2 + 0.2
    head = torch.cat((scale, -7.5 * scale), dim=-1).half()
    rows[..., :_HEADER] = head.view(torch.uint8)
    return rows


def _floats(rows: torch.Tensor) -> torch.Tensor:
    """Return the numbers of rows whose bytes hold neighbours, low nibble first: float32."""
    head = rows[..., :_HEADER].contiguous().view(torch.float16).float()
    nibbles = torch.stack((rows[..., _HEADER:] & 15, rows[..., _HEADER:] >> 4), dim=-1).flatten(-2)
    return nibbles.float() * head[..., :1] + head[..., 1:]


def _fbgemm(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend by gqa_attn_splitk: heads that share keys are the heads of one sequence there."""
    import fbgemm_gpu.experimental.gen_ai  # pyright: ignore[reportMissingImports]  # noqa: F401

    batch, kv_heads, group, head_dim = query.shape
    context = keys.shape[2]
    q = query.reshape(batch * kv_heads, 1, group, head_dim)
    k, v = (t.reshape(batch * kv_heads, context, 1, -1) for t in (keys, values))
    last = torch.full((len(q),), context - 1, dtype=torch.int32, device=q.device)
    splits = max(1, min(context // 256, 1024 // len(q)))
    out = torch.ops.fbgemm.gqa_attn_splitk(q, k, v, last, head_dim**-0.5, splits, 1)[0]
    return out.reshape(batch, kv_heads, group, head_dim)


def _mslk(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend by the Triton split-K forward, which reads rows as int32."""
    from mslk.attention import fmha  # pyright: ignore[reportMissingImports]
    from mslk.attention.fmha import triton_splitk  # pyright: ignore[reportMissingImports]

    batch, kv_heads, group, head_dim = query.shape
    context = keys.shape[2]
    q = query.reshape(batch, 1, kv_heads, group, head_dim)
    rows = (t.view(torch.int32).transpose(1, 2).unsqueeze(3) for t in (keys, values))
    k, v = (t.expand(-1, context, kv_heads, group, -1) for t in rows)
    found = fmha.memory_efficient_attention_forward(
        q, k, v, scale=head_dim**-0.5, op=triton_splitk.FwOp
    )
    return found.reshape(batch, kv_heads, group, head_dim)


KV_PEERS: dict[str, Attention] = {
    "fbgemm_int4_kv": _fbgemm,
    "mslk_int4_kv": _mslk,
}


def kv_peers(
    operations: Operations,
    device: torch.device,
    names: tuple[str, ...],
    results: Results,
    cases: Mapping[str, tuple[int, int, int, int]] = kv_decode.KV_CASES,
) -> None:
    """Time decode attention on 4-bit rows by the peers whose names begin with one of `names`."""
    for name, attend in KV_PEERS.items():
        for case, shape in cases.items():
            if name.startswith(names):
                results.attempt(
                    f"peer/{name}/kv_decode/{case}",
                    lambda a=attend, s=shape, w=f"{name}/kv_decode/{case}": _attend(
                        operations, a, s, w, device, results
                    ),
                )


def _attend(
    operations: Operations,
    attend: Attention,
    shape: tuple[int, int, int, int],
    where: str,
    device: torch.device,
    results: Results,
) -> None:
    generator = torch.Generator(device).manual_seed(6)
    batch, context, heads, kv_heads = shape
    size = (batch, kv_heads, context, kv_decode.HEAD_DIM)
    query = random_floats(batch, heads, 1, size[-1], generator=generator)
    grouped = query.flatten(1, 2).unflatten(1, (kv_heads, -1))
    mine, row_bytes = kv_decode.ours(operations, query, (context, kv_heads), generator)
    caches = [
        (_rows(size, generator), _rows(size, generator))
        for _ in range(copies_for(2 * row_bytes, device))
    ]
    found = attend(grouped, *caches[0]).float()
    off = min(
        ((found - _expected(grouped, *caches[0], order)).abs().max() / found.abs().max()).item()
        for order in (False, True)
    )
    if not off < _CLOSE:
        raise ValueError(f"the result is off by {off:.3g}: not timed")
    works: dict[str, list[Work]] = {
        "ours": mine,
        "peer": [lambda c=c: attend(grouped, *c) for c in caches],
    }
    seconds = results.measure(f"peer/{where}", works, device)
    results.add({f"peer/{where}": seconds["ours"] / seconds["peer"]})


def _expected(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, halves: bool
) -> torch.Tensor:
    """Attend in float32; halves: a row's low nibbles are its first half."""
    k, v = (_floats(t) for t in (keys, values))
    if halves:
        k, v = (torch.cat((t[..., ::2], t[..., 1::2]), dim=-1) for t in (k, v))
    scores = grouped.float() @ k.mT / math.sqrt(k.shape[-1])
    return scores.softmax(-1) @ v


def _dao(x: torch.Tensor) -> torch.Tensor:
    """Rotate by a Hadamard matrix of order 28·2^k, in 16 bits and without a quantizer."""
    from fast_hadamard_transform import (  # pyright: ignore[reportMissingImports]
        hadamard_transform_28N,
    )

    return hadamard_transform_28N(x, x.shape[1] ** -0.5)


def _humming(x: torch.Tensor) -> torch.Tensor:
    """Rotate blocks of the largest power of two and quantize to 4 bits, in one kernel."""
    from humming.ops import process_input  # pyright: ignore[reportMissingImports]

    block = min(x.shape[1] & -x.shape[1], 2048)
    settings = {"quant_mode": "dynamic_token", "quant_dtype": "int4"}
    return process_input(x, hadamard_block_size=block, **settings)[0]


# name -> (work, widths): what comes closest to our rotation and quantizer in one kernel
ROTATION_PEERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "dao_hadamard_alone": (_dao, (14336,)),
    "humming_block_hadamard_quant": (_humming, (11008, 14336)),
}


def rotation_peers(
    operations: Operations,
    device: torch.device,
    names: tuple[str, ...],
    results: Results,
    tokens: int = 8192,
) -> None:
    """Time rotations by the peers whose names begin with one of `names` against ours."""
    for name, (work, widths) in ROTATION_PEERS.items():
        for width in widths:
            if name.startswith(names):
                results.attempt(
                    f"peer/{name}/hadamard_quant/{width}",
                    lambda w=work, where=f"{name}/hadamard_quant/{width}", size=(tokens, width): (
                        _rotate(operations, w, size, where, device, results)
                    ),
                )


def _rotate(
    operations: Operations,
    work: Callable[[torch.Tensor], torch.Tensor],
    size: tuple[int, int],
    where: str,
    device: torch.device,
    results: Results,
) -> None:
    generator = torch.Generator(device).manual_seed(7)
    xs = [
        random_floats(*size, generator=generator)
        for _ in range(copies_for(2 * size[0] * size[1], device))
    ]
    found = work(xs[0])
    if found.dtype == xs[0].dtype:  # an orthogonal map keeps lengths; a quantizer has no floats
        change = (found.float().norm() / xs[0].float().norm() - 1).abs().item()
        if not change < 0.01:
            raise ValueError(f"lengths change by {change:.3g}: not timed")
    rotation = hadamard_rotation(size[1])
    works: dict[str, list[Work]] = {
        "ours": [
            lambda x=x: operations.rotate_quantize(x, rotation, QUANTIZER, summed=False) for x in xs
        ],
        "peer": [lambda x=x: work(x) for x in xs],
    }
    seconds = results.measure(f"peer/{where}", works, device)
    results.add({f"peer/{where}": seconds["ours"] / seconds["peer"]})
