"""Time decode attention on coded keys and values against torch on bf16 ones."""

import math
from collections.abc import Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spinlab.bench.operands import random_floats, random_rows
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for, measure
from spinlab.config import CodecConfig
from spinlab.config.kv import LloydMaxConfig
from spinlab.errors import ResultError
from spinlab.kv.base import PackedLayout
from spinlab.kv.codecs import make_codec
from spinlab.kv.history import History
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.attention import reference as attention
from spinlab.runtime.kernels.kv.floats import FloatTokens, empty_tokens
from spinlab.runtime.kernels.kv.rows import PackedRows

HEAD_DIM = 128
# batch, filled slots, query heads, key and value heads
KV_CASES: dict[str, tuple[int, int, int, int]] = {
    "b16_c8192_h32_kv8": (16, 8192, 32, 8),
    "b1_c8192_h32_kv8": (1, 8192, 32, 8),
    "b1_c8192_h32_kv32": (1, 8192, 32, 32),
    "b64_c768_h32_kv32": (64, 768, 32, 32),
    "b16_c768_h32_kv32": (16, 768, 32, 32),
}
# what kernels read beside the 4-bit grid, in 4 bits a number too
CODECS = {
    "affine2": CodecConfig(bits=2),
    **{
        f"lloyd_max{bits}": CodecConfig(
            codec="lloyd_max", bits=bits, lloyd_max=LloydMaxConfig(turn="none")
        )
        for bits in (2, 3, 4)
    },
}
# with the first and the newest tokens in 16 bits, as presets of these names but the first have them
WINDOWS = {
    "affine4_window": (CodecConfig(), History(4, 128)),
    **{f"lloyd_max{b}_window": (CODECS[f"lloyd_max{b}"], History(4, 128)) for b in (2, 3)},
}
_CLOSE = 2.0**-6  # of the largest output; weights and outputs are rounded to 16 bits
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ALL_CODED = History()
Case = tuple[str, tuple[int, int, int, int]]
Drawn = tuple[PackedRows, PackedRows, FloatTokens | None]


def kv(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: Mapping[str, tuple[int, int, int, int]] = KV_CASES,
) -> None:
    """Time attention on 4-bit keys and values against torch's fastest on bf16 ones."""
    generator = torch.Generator(device).manual_seed(4)
    for case in cases.items():
        kv_decode(operations, case, generator, rates, results)


def kv_decode(
    operations: Operations,
    case: Case,
    generator: torch.Generator,
    rates: Mapping[str, float],
    results: Results,
    head_dim: int = HEAD_DIM,
) -> None:
    """Add a case's speedup over torch's fastest back end, and the seconds of every one.

    Those of other codecs are held against the same. Floors are the bytes that are read.
    """
    name, (batch, context, heads, kv_heads) = case
    query = random_floats(batch, heads, 1, head_dim, generator=generator)
    works, row_bytes = ours(operations, query, (context, kv_heads), generator)
    timings = measure({"ours": works}, query.device)
    for label, calls in _of_torch(query, (context, kv_heads), generator).items():

        def take(label: str = label, calls: list[Work] = calls) -> None:
            timings.update(measure({label: calls}, query.device))

        results.attempt(f"kv_decode/{name}/{label}", take)
    results.times(f"kv_decode/{name}", timings)
    best = min(t.seconds for label, t in timings.items() if label != "ours")
    results.add(
        {
            f"speedup/kv_decode/{name}": best / timings["ours"].seconds,
            f"speed/kv_decode/{name}/bf16": best,
            f"floor/kv_decode/{name}": 2 * row_bytes / rates["copy"],
        }
    )
    others = {codec: (settings, _ALL_CODED) for codec, settings in CODECS.items()} | WINDOWS
    for codec, (settings, history) in others.items():
        side = make_codec("kv.keys", settings, head_dim, 0)
        assert side is not None and side.packed is not None, "kernels read all of CODECS"
        works, _ = ours(operations, query, (context, kv_heads), generator, side.packed, history)
        seconds = results.measure(f"kv_decode/{codec}/{name}", {"ours": works}, query.device)
        results.add({f"speedup/kv_decode/{codec}/{name}": best / seconds["ours"]})
        if codec in WINDOWS:
            read = 2 * batch * kv_heads * _read(side.packed, history, context)
            results.add({f"floor/kv_decode/{codec}/{name}": read / rates["copy"]})


def _read(layout: PackedLayout, history: History, context: int) -> int:
    """Return the bytes of one side of a head that attention reads: codes, and 16-bit numbers."""
    coded = history.coded(context)
    return coded * layout.row_bytes + 2 * layout.width * (context - coded)


def ours(
    operations: Operations,
    query: torch.Tensor,
    cache: tuple[int, int],
    generator: torch.Generator,
    layout: PackedLayout | None = None,
    history: History = _ALL_CODED,
) -> tuple[list[Work], int]:
    """Return our attention over full caches, checked, and the bytes of one's coded keys.

    query: (batch, heads, 1, head_dim); cache: slots, heads; layout: as of `random_rows`; history:
    which tokens are in floats.
    """
    (batch, _, _, head_dim), (context, kv_heads) = query.shape, cache
    start = torch.zeros(batch, dtype=torch.int32, device=query.device)
    length = torch.full((1,), context, dtype=torch.int64, device=query.device)
    scaling = 1 / math.sqrt(head_dim)

    def draw() -> Drawn:
        keys, values = (
            random_rows(batch, kv_heads, context, head_dim, generator, layout) for _ in range(2)
        )
        return keys, values, _floats(start, kv_heads, query, history, generator)

    first = draw()
    count = copies_for(2 * first[0].bytes, query.device)
    caches = [first, *(draw() for _ in range(count - 1))]

    def attend(keys: PackedRows, values: PackedRows, floats: FloatTokens | None) -> torch.Tensor:
        return operations.attend(query, keys, values, start, length, scaling, floats=floats)

    keys, values, floats = first
    expected = attention.attend(query, keys, values, start, length, scaling, floats=floats).float()
    error = (attend(*first).float() - expected).abs().max() / expected.abs().max()
    if not error < _CLOSE:
        raise ResultError(f"attention of {tuple(query.shape)} is off by {error:.3g}")
    return [lambda c=c: attend(*c) for c in caches], first[0].bytes


def _floats(
    start: torch.Tensor,
    kv_heads: int,
    query: torch.Tensor,
    history: History,
    generator: torch.Generator,
) -> FloatTokens | None:
    """Draw tokens in floats, where there are some."""
    if history.codes_all:
        return None
    kept = history.sinks, history.window
    floats = empty_tokens((len(start), kv_heads, query.shape[3]), kept, start, query.dtype)
    for part in floats.tensors:
        part.normal_(generator=generator)
    return floats


def _of_torch(
    query: torch.Tensor, cache: tuple[int, int], generator: torch.Generator
) -> dict[str, list[Work]]:
    """Return torch's attention by every back end: on grouped heads, and on repeated ones."""
    (batch, heads, _, head_dim), (context, kv_heads) = query.shape, cache
    shape = (batch, kv_heads, context, head_dim)
    size = 2 * 2 * math.prod(shape)
    caches = [
        (random_floats(*shape, generator=generator), random_floats(*shape, generator=generator))
        for _ in range(copies_for(size, query.device))
    ]

    def call(pair: tuple[torch.Tensor, torch.Tensor], backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, *pair, enable_gqa=heads != kv_heads)

    works: dict[str, list[Work]] = {
        name: [lambda p=pair, b=backend: call(p, b) for pair in caches]
        for name, backend in _BACKENDS.items()
    }
    if heads != kv_heads:  # queries of a group as tokens of one head: no mask is needed here
        grouped = query.flatten(1, 2).unflatten(1, (kv_heads, -1))

        def folded(pair: tuple[torch.Tensor, torch.Tensor], backend: SDPBackend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(grouped, *pair)

        for name, backend in _BACKENDS.items():
            works[f"{name}_folded"] = [lambda p=p, b=backend: folded(p, b) for p in caches]
    return works
