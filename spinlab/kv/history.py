"""Layers of the cache that keep some tokens in floats: sinks, a recent window, unfinished runs.

What a token sees does not depend on the pass that it comes in. A token that is the n-th of its
sequence sees coded whatever is coded once n tokens are there, and the rest in floats: so it is
where tokens come one by one, in chunks, or all at once, as in teacher-forced evaluation. In a pass
of several tokens an earlier token can be coded for the last of them and not yet for the first. It
then stands in the answer twice, coded in its place and in floats behind all tokens, and a mask lets
every query see one of the two.
"""

import math
from dataclasses import dataclass

import torch

from spinlab.kv.base import RowCodec
from spinlab.kv.layers import coded, decoded, joined, rounded


@dataclass(frozen=True)
class History:
    """Say which tokens are coded: those from `sinks` on, in whole runs, behind a window of floats.

    Sequences begin with slot 0.
    """

    sinks: int = 0
    window: int = 0
    run: int = 1

    @property
    def codes_all(self) -> bool:
        """Tell whether every token is coded at once."""
        return (self.sinks, self.window, self.run) == (0, 0, 1)

    @property
    def counts(self) -> bool:
        """Tell whether it matters which slot is a sequence's first."""
        return self.sinks > 0 or self.run > 1

    def coded(self, tokens: int) -> int:
        """Return how many tokens behind the sinks are coded once so many are there."""
        return max(tokens - self.sinks - self.window, 0) // self.run * self.run

    def twice(self, past: int, new: int) -> slice:
        """Return the tokens that some queries of a pass see in floats, and others coded."""
        if self.window == 0 and self.run == 1:  # each is coded as soon as it is there
            return slice(0, 0)
        return slice(*(self.sinks + self.coded(n) for n in (past + 1, past + new)))

    def mask(
        self, seen: torch.Tensor | None, new: int, device: torch.device
    ) -> torch.Tensor | None:
        """Return what the queries of a pass see of what a layer answers.

        seen: (batch or 1, heads or 1, new, tokens) bool, what they would see of the tokens, None
        where each sees itself and all before. The same with as many more as stand there twice.
        """
        tokens = new if seen is None else seen.shape[-1]
        twice = self.twice(tokens - new, new)
        if twice.start == twice.stop:
            return seen
        place = torch.arange(tokens, device=device)
        if seen is None:
            seen = (place <= place[-new:, None])[None, None]
        ends = [self.sinks + self.coded(n) for n in range(tokens - new + 1, tokens + 1)]
        end = torch.tensor(ends, device=device)[:, None]
        in_place = seen & ((place < end) | (place >= twice.stop))
        return torch.cat((in_place, seen[..., twice] & (place[twice] >= end)), dim=-1)


class PassMasks:
    """Keep the masks of one pass of a model: layers of equal histories see alike.

    They are quadratic in the context, and are let go at its end, or when a layer sees otherwise.
    """

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def of(
        self, history: History, seen: torch.Tensor | None, new: int, device: torch.device
    ) -> torch.Tensor | None:
        """Return `history.mask` of the same arguments."""
        key = history, id(seen), new, device
        if any(known is not seen for known, _ in self._made.values()):
            self._made.clear()
        if key not in self._made:  # beside what is seen, whose id nothing else has while it is here
            self._made[key] = seen, history.mask(seen, new, device)
        return self._made[key][1]

    def clear(self) -> None:
        """Forget them."""
        self._made.clear()


class HistoryLayer:
    """Keep floats of sinks and of the newest tokens, and coded runs in between.

    What was coded and must be floats again, because later tokens were cropped away, is what the
    codes stand for.
    """

    def __init__(
        self, history: History, key_codec: RowCodec | None, value_codec: RowCodec | None
    ) -> None:
        self.history, self.codecs = history, (key_codec, value_codec)
        self.reset()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; return all as the last sees them, then those that stand twice."""
        past, new = self.tokens, keys.shape[-2]
        done, ready = (self.history.coded(n) for n in (past, past + new))
        twice, answers = self._twice_behind(past, new), []
        for side, x in enumerate((keys, values)):
            floats = joined(self.floats[side], x)
            first, due, rest = _cut(floats, self.history.sinks, ready - done)
            codec = self.codecs[side]
            if ready > done:
                self.rows[side] = joined(self.rows[side], coded(due, codec))
            self.floats[side] = torch.cat((first, rest), dim=-2)
            known = self._decoded(side, x)
            answers.append(torch.cat((first, known, rest, floats[..., twice, :]), dim=-2))
        return answers[0], answers[1]

    def round(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `append` does on an empty layer, and store nothing."""
        ready, twice = self.history.coded(keys.shape[-2]), self._twice_behind(0, keys.shape[-2])
        answers = []
        for x, codec in zip((keys, values), self.codecs, strict=True):
            first, due, rest = _cut(x, self.history.sinks, ready)
            parts = (first, rounded(due, codec) if ready else due, rest, x[..., twice, :])
            answers.append(torch.cat(parts, dim=-2))
        return answers[0], answers[1]

    def crop(self, tokens: int) -> None:
        """Keep the first tokens, so many."""
        if tokens >= self.tokens:
            return
        if tokens == 0:
            self.reset()
            return
        stay, sinks = self.history.coded(tokens), self.history.sinks
        for side, codec in enumerate(self.codecs):
            floats = self.floats[side]
            assert floats is not None, "tokens are stored"
            first, _, rest = _cut(floats, sinks, 0)
            whole = torch.cat((first, self._decoded(side, floats), rest), dim=-2)[..., :tokens, :]
            first, _, rest = _cut(whole, sinks, stay)
            self.floats[side] = torch.cat((first, rest), dim=-2)
            if (rows := self.rows[side]) is not None:
                self.rows[side] = rows[..., : stay // _run(codec), :] if stay else None

    def reorder(self, sequences: torch.Tensor) -> None:
        """Take these sequences, by index, in this order."""
        for kept in (self.floats, self.rows):
            for side, rows in enumerate(kept):
                if rows is not None:
                    kept[side] = rows.index_select(0, sequences.to(rows.device))

    def reset(self) -> None:
        """Forget all tokens."""
        self.floats: list[torch.Tensor | None] = [None, None]  # of sinks, then of the newest
        self.rows: list[torch.Tensor | None] = [None, None]

    @property
    def tokens(self) -> int:
        """Return how many tokens are stored."""
        floats, rows = self.floats[0], self.rows[0]
        known = 0 if rows is None else rows.shape[-2] * _run(self.codecs[0])
        return known + (0 if floats is None else floats.shape[-2])

    @property
    def sequences(self) -> int:
        """Return how many sequences they belong to, 0 without tokens."""
        return 0 if self.floats[0] is None else self.floats[0].shape[0]

    @property
    def bytes(self) -> int:
        """Return the bytes that floats and coded rows take."""
        kept = (t for t in (*self.floats, *self.rows) if t is not None)
        return sum(t.numel() * t.element_size() for t in kept)

    def _twice_behind(self, past: int, new: int) -> slice:
        """Return where the floats that a layer holds have the tokens that stand twice."""
        done, twice = self.history.coded(past), self.history.twice(past, new)
        return slice(twice.start - done, twice.stop - done)

    def _decoded(self, side: int, like: torch.Tensor) -> torch.Tensor:
        """Return coded tokens as floats (batch, kv_heads, tokens, head_dim), of none none."""
        rows = self.rows[side]
        return like[..., :0, :] if rows is None else decoded(rows, self.codecs[side], like.dtype)


def run_of(*codecs: RowCodec | None) -> int:
    """Return how many tokens codecs can only code together."""
    return math.lcm(*(_run(codec) for codec in codecs))


def _run(codec: RowCodec | None) -> int:
    return 1 if codec is None else codec.run


def _cut(x: torch.Tensor, sinks: int, due: int) -> tuple[torch.Tensor, ...]:
    """Cut tokens into sinks, those that are due to be coded, and the rest."""
    first = min(sinks, x.shape[-2])
    return x.split([first, due, x.shape[-2] - first - due], dim=-2)
