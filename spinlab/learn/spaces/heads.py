"""R3 while it is learned: keys and queries are rounded in its basis, and meet in their own.

Scores are (q R3)·Q(k R3) = q·(Q(k R3) R3ᵀ): only what rounding leaves depends on R3, and the
gradient of R3 comes from there alone. With R3 on both sides, as the network runs later, it would be
what remains of two large parts that cancel. What R3 can win is a smaller range, of which a
straight-through gradient knows nothing: codecs give theirs by the range, where they have one.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel

from spinlab.kv.base import RowCodec
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.kv.path import KVPath, Sides
from spinlab.learn.learned import LearnedRotations, Sink
from spinlab.learn.spaces.rotate import read_stream, rotate, rotate_back


def learn_heads(model: PreTrainedModel, rotations: LearnedRotations) -> None:
    """Put a learned R3 in place of the one in a model's path of keys and queries; else nothing."""
    if rotations.r3 is not None:
        path = kv_path_of(model).turned_by(None)
        set_kv_path(model, HeadPath(**vars(path), rotations=rotations))


@dataclass(frozen=True)
class HeadPath(KVPath):
    """Say what keys and queries go through while R3 is learned: x ↦ Q(x R3) R3ᵀ, not R3 itself."""

    rotations: LearnedRotations = field(kw_only=True)

    def sides(self, layer: int) -> Sides:
        """Return the codecs of a layer, that of its keys in the basis of R3."""
        keys, values = super().sides(layer)
        if keys is None:
            return Sides(None, values)
        return Sides(cast(RowCodec, HeadCodec(keys, self.rotations, layer)), values)

    def turn_queries(self, query: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Return queries (batch, heads, tokens, head_dim) as they meet the keys of a layer.

        Scores have R3 as a free matrix on both sides. What its Euclidean gradient has beside the
        generators of rounding is the same by keys and by queries, and is taken here, where all
        pass: H = qᵀ g for queries q as keys meet them (`spinlab.learn.spaces.rotate`).
        """
        sink = self.rotations.sink("r3", layer)
        if self.queries is not None:
            query = self._rounded_queries(query, layer)
        if sink.add_half is None:
            return query
        anchor = self.rotations.anchor("r3")
        return self.on_turned(lambda turned: read_stream(turned, anchor, sink), query)

    def _rounded_queries(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """Round queries in the basis of R3, which may turn but the last numbers of a head."""
        assert self.queries is not None
        r3, anchor = self.rotations.at("r3", layer), self.rotations.anchor("r3")
        sink = Sink(self.rotations.sink("r3", layer).add)
        y = self.on_turned(lambda turned: rotate(turned, r3, anchor, sink), query)
        error = self.queries.pass_by_range(y) - y
        return query + self.on_turned(lambda e: rotate_back(e, r3, anchor, sink), error)


@dataclass(frozen=True, eq=False)
class HeadCodec:
    """Stand in for a codec of keys where nothing is stored, and round in the basis of R3."""

    codec: RowCodec
    rotations: LearnedRotations
    layer: int

    @property
    def run(self) -> int:
        return self.codec.run

    def pass_through(self, x: torch.Tensor) -> torch.Tensor:
        """Round x: (..., head_dim), with a gradient for x, for R3 and for what the codec learns."""
        return _rounded(x, self.codec, self.rotations, self.layer)


def _rounded(
    x: torch.Tensor, codec: RowCodec, rotations: LearnedRotations, layer: int
) -> torch.Tensor:
    """Return Q(x R) Rᵀ for x (..., head_dim), taken as x + (Q(y) - y) Rᵀ, y = x R.

    A 16-bit R then only blurs the error. Of the gradient, y gets what the codec's has beside the
    identity: where that goes straight through, none.
    """
    r3, anchor = rotations.at("r3", layer), rotations.anchor("r3")
    sink = Sink(rotations.sink("r3", layer).add)
    y = rotate(x, r3, anchor, sink)
    return x + rotate_back(codec.pass_by_range(y) - y, r3, anchor, sink)
