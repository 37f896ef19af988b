"""What a pass meets in torch where some tokens are in floats: coded ones, the window, the sinks.

As in `spinlab.kv.history`, a query sees the first tokens and the newest, itself counted, in floats,
and those in between as they are coded. Queries come in chunks, so that no mask is quadratic in the
context.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.slots import Rows, numbers_of
from spinlab.runtime.kernels.kv.floats import FloatTokens

_QUERIES = 512  # of a chunk
Sides = tuple[torch.Tensor, torch.Tensor]


class Seen(NamedTuple):
    """Hold what queries of a pass meet.

    queries       which of the pass
    keys, values  (batch, kv_heads, n, head_dim)
    slots         (batch or 1, n), of the keys
    mask          (batch or 1, 1, queries, n) bool
    """

    queries: slice
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


def before_pass(floats: FloatTokens, cache: IntegerCache) -> Sides:
    """Return the floats that a pass of several tokens sees of tokens before it.

    They are read before it stores its own.
    """
    return floats.read(_first(floats, cache), cache.filled)


def seen_by_pass(
    rows: tuple[Rows, Rows], floats: FloatTokens, newest: Sides, cache: IntegerCache
) -> Iterator[Seen]:
    """Yield what the queries of a pass of several tokens meet, chunk by chunk.

    newest: floats of what `before_pass` gave and of the pass, whose tokens are stored.
    """
    window, end, first = floats.window, cache.filled + cache.tokens, _first(floats, cache)
    coded = [numbers_of(part, max(end - window, 0), floats.keys.dtype) for part in rows]
    for a in range(cache.filled, end, _QUERIES):
        b = min(a + _QUERIES, end)
        old = max(b - window, 0)
        begin = max(a + 1 - window, 0) if window else b
        place = torch.arange(b, device=floats.start.device)
        parts = [
            (x[:, :, :old], new[:, :, begin - first : b - first])
            for x, new in zip(coded, newest, strict=True)
        ]
        now = slice(a - cache.filled, b - cache.filled)
        yield _seen(now, parts, (place[a:], place[:old], place[begin:]), floats, cache.padded)


def seen_by_token(rows: tuple[Rows, Rows], floats: FloatTokens, cache: IntegerCache) -> Seen:
    """Return what one new token of each sequence meets, at sizes that no length changes."""
    slots = cache.slots
    parts = [
        (numbers_of(part, slots.capacity, kept.dtype), kept[:, :, floats.sinks :])
        for part, kept in zip(rows, floats.tensors, strict=True)
    ]
    place = torch.arange(slots.capacity, device=floats.start.device)
    places = slots.position, place, floats.newest_slots(slots.length)
    return _seen(slice(0, 1), parts, places, floats, padded=True)


def _first(floats: FloatTokens, cache: IntegerCache) -> int:
    """Return the first slot that the first query of a pass sees in the window."""
    return max(min(cache.filled + 1 - floats.window, cache.filled), 0)


def _seen(
    queries: slice,
    parts: list[Sides],
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    floats: FloatTokens,
    padded: bool,
) -> Seen:
    """Put sinks behind coded and newest tokens, and say what queries see of them.

    parts: of keys and of values; places: slots of queries, of coded and of newest tokens. A padding
    token sees itself, so that it stays finite.
    """
    sequences = slice(None) if padded else slice(0, 1)  # without padding all are alike
    query, coded, newest = places
    keys, values = (
        torch.cat((*part, kept[:, :, : floats.sinks]), 2)
        for part, kept in zip(parts, floats.tensors, strict=True)
    )
    start, sinks = floats.start[sequences, None, None], floats.sink_slots()[sequences]
    query, edge = query[:, None], query[:, None] - floats.window
    alone = query < start
    in_rows = (coded >= start + floats.sinks) & (coded <= edge)
    in_window = (newest >= start + floats.sinks) & (newest <= query) & (newest > edge)
    if floats.window:
        in_window |= alone & (newest == query)
    else:
        in_rows |= alone & (coded == query)
    mask = torch.cat((in_rows, in_window, sinks[:, None] <= query), 2)[:, None]
    slots = torch.cat((torch.cat((coded, newest)).expand(len(sinks), -1), sinks), 1)
    return Seen(queries, keys, values, slots, mask)
