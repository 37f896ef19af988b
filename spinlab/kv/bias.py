"""Biases of keys, kept apart from what the cache codes.

A key is R3(RoPE(W x + b, n)) = R3(RoPE(W x, n)) + R3(RoPE(b, n)) at position n. The second part is
known without any key. Where b is long, a codec that has to code both spends its levels on it, and
the noise of logits grows with its norm.
So the linear of the keys loses its bias, the cache codes what is left, and the second part comes
back where keys are read, by the positions of their tokens.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.kv.base import OwnTensor
from spinlab.kv.rope import Angles, rotary
from spinlab.model.modules import linear_at, map_of
from spinlab.rotation.online import LayerRotations, OnlineRotation

POSITION_BITS = 32  # of a token, for all layers and heads
# cosines and sines of RoPE at positions (batch or 1, tokens): (batch or 1, tokens, rotary_dim)
WavesAt = Callable[[torch.Tensor], torch.Tensor]


class BiasScores(NamedTuple):
    """Say what a bias of keys adds to the scores of queries, before they are scaled.

    To slot n that is vectors · waves[n]: no key is needed for it, and waves are those of all heads
    and layers.

    vectors  (batch, heads, rotary_dim), float32 or wider
    waves    (batch or 1, slots, rotary_dim), in the same dtype: cosines, then sines
    """

    vectors: torch.Tensor
    waves: torch.Tensor


def waves_of(waves: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return waves (batch or 1, slots, rotary_dim) of some slots (batch or 1, n).

    Those of slots that are not there are anything.
    """
    batch = max(len(waves), len(slots))
    places = slots.clamp(0, waves.shape[1] - 1)[..., None].expand(batch, -1, waves.shape[-1])
    return waves.expand(batch, -1, -1).gather(1, places)


class _Parts(NamedTuple):
    """Hold what a bias becomes as part of a key: waves · turning + rest, of all KV heads."""

    turning: OwnTensor  # (rotary_dim, kv_heads·head_dim)
    rest: OwnTensor | None  # (kv_heads, 1, head_dim); None where all numbers turn


class KeyBias:
    """Hold what the linear of one layer's keys added to each of them: (kv_heads, head_dim).

    rope: whether RoPE turns the keys of the layer; r3: what does behind it.
    """

    def __init__(self, bias: torch.Tensor, rope: bool, r3: OnlineRotation | None) -> None:
        self.bias, self._rope, self._r3 = bias, rope, r3
        self._parts: dict[int, _Parts] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyBias":
        return self  # it does not change, and a copied cache is still one of the same model

    def turned_by(self, r3: OnlineRotation | None) -> "KeyBias":
        """Return the same bias where another R3 turns the keys."""
        return KeyBias(self.bias, self._rope, r3)

    def added(self, keys: torch.Tensor, waves: torch.Tensor) -> torch.Tensor:
        """Return keys with it, rounded once.

        keys: (batch, kv_heads, tokens, head_dim); waves: (batch or 1, tokens, rotary_dim), at the
        positions of the tokens, in float32 or wider.
        """
        waves = waves if self._rope else waves[..., :0]
        turning, rest = self._at(waves.shape[-1])
        known = waves.flatten(0, 1) @ turning.like(waves)
        known = known.view(*waves.shape[:2], *self.bias.shape).transpose(1, 2)
        found = keys + known
        return (found if rest is None else found + rest.like(waves)).to(keys.dtype)

    def scores(self, query: torch.Tensor, waves: torch.Tensor) -> BiasScores | None:
        """Return what it adds to the scores of one token: (batch, heads, 1, head_dim), turned.

        What does not turn adds the same to all scores of a query, which softmax does not see: it is
        left out, and without RoPE nothing is left.
        """
        if not self._rope:
            return None
        turning = self._at(waves.shape[-1]).turning.like(waves)
        by_head = turning.view(-1, *self.bias.shape).permute(1, 2, 0)
        grouped = query.flatten(1, 2).unflatten(1, (len(by_head), -1)).to(waves.dtype)
        return BiasScores((grouped @ by_head).flatten(1, 2), waves)

    def _at(self, rotary_dim: int) -> _Parts:
        """Return the parts of it where RoPE turns so many numbers of a head.

        What RoPE and R3 make of it is linear in the cosines and sines of a token, so that tokens
        with one of them each give all.
        """
        if rotary_dim not in self._parts:
            half, wide = rotary_dim // 2, torch.promote_types(self.bias.dtype, torch.float32)
            cos = self.bias.new_zeros(1, rotary_dim + 1, rotary_dim, dtype=torch.float64)
            sin = cos.clone()
            cos[:, :half] = sin[:, half:-1] = torch.eye(half).repeat(1, 2)
            bias = self.bias.double()[None, :, None].expand(-1, -1, rotary_dim + 1, -1)
            rows = rotary(bias, cos, sin)
            rows = (rows if self._r3 is None else self._r3(rows))[0]
            rest = rows[:, -1:]  # of a token with neither
            turning = (rows[:, :-1] - rest).transpose(0, 1).flatten(1)
            stays = rotary_dim < self.bias.shape[-1]
            of_rest = OwnTensor(rest.to(wide)) if stays else None
            self._parts[rotary_dim] = _Parts(OwnTensor(turning.contiguous().to(wide)), of_rest)
        return self._parts[rotary_dim]


KeyBiases = tuple[KeyBias | None, ...]  # by layer; () where no layer has one


def take_key_biases(
    model: PreTrainedModel, r3: OnlineRotation | LayerRotations | None
) -> KeyBiases:
    """Take the biases that can be kept apart out of a model's key linears, in place.

    r3: what turns keys and queries behind RoPE. The linears keep a bias of zeros, so that what sums
    with one goes on as it did. It is done before anything else takes the linears over.
    """
    described = map_of(model)
    if not described.key_biases:
        return ()
    found: list[KeyBias | None] = []
    for index, layer in enumerate(described.layers):
        if index not in described.key_biases or index not in described.there:
            found.append(None)
            continue
        attention, linear = layer.attention, linear_at(model, layer.attention.keys)
        assert linear.bias is not None, "the map says that it has one"
        bias = linear.bias.detach()
        linear.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        shape = (attention.kv_heads, attention.head_dim)
        own = None if r3 is None else r3.at(index)
        found.append(KeyBias(bias.unflatten(0, shape), attention.rope, own))
    return tuple(found)


class Positions:
    """Remember the positions of a cache's tokens, and RoPE's waves there for one pass.

    stored: (batch, tokens) int32, or (1, tokens) where all sequences have the same.
    """

    def __init__(self) -> None:
        self.stored: torch.Tensor | None = None
        self.waves: torch.Tensor | None = None

    def add(self, new: torch.Tensor, past: int, waves_at: WavesAt, keep: bool) -> None:
        """Put positions (batch or 1, tokens) of a pass behind the first `past`, which stay.

        keep: the pass stores its tokens.
        """
        found = new.to(torch.int32)
        if past:
            assert self.stored is not None, "earlier passes told theirs"
            batch = max(len(self.stored), len(new))
            parts = (part.expand(batch, -1) for part in (self.stored[:, :past], found))
            found = torch.cat(tuple(parts), dim=1)
        self.waves = waves_at(found)
        self.stored = found if keep else None

    def crop(self, tokens: int) -> None:
        """Keep those of the first tokens."""
        if self.stored is not None:
            self.stored = self.stored[:, :tokens] if tokens else None

    def reorder(self, sequences: torch.Tensor) -> None:
        """Take these sequences, by index, in this order."""
        if self.stored is not None and len(self.stored) > 1:
            self.stored = self.stored.index_select(0, sequences.to(self.stored.device))

    @property
    def bytes(self) -> int:
        return 0 if self.stored is None else self.stored.numel() * self.stored.element_size()


class Turned(Protocol):
    """A cache that hears at which positions the tokens of a pass are turned."""

    def turned(self, positions: torch.Tensor, waves_at: WavesAt) -> None:
        """Take positions (batch or 1, tokens), and what gives waves in float32 or wider."""
        ...


class RopeWatch:
    """Tell the cache of a pass at which positions a model's RoPE turns the tokens of the pass.

    The module of RoPE is the one place that every pass goes through with the positions it means.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._cache: weakref.ref[Any] | None = None
        self._once = map_of(model).rope_once
        rope = model.get_submodule(map_of(model).rope)
        rope.register_forward_hook(self._turned, with_kwargs=True)

    def begin(self, cache: Turned) -> None:
        """Name the cache of the pass that begins."""
        self._cache = weakref.ref(cache)

    def _turned(self, rope: nn.Module, args: tuple, kwargs: dict, found: Angles) -> None:
        cache: Turned | None = None if self._cache is None else self._cache()
        if cache is None:
            return
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        wide = torch.promote_types(found[0].dtype, torch.float32)
        like = found[0].new_empty(0, dtype=wide)

        def waves_at(positions: torch.Tensor) -> torch.Tensor:
            angles: Angles = rope.forward(like, positions)  # itself, which no hook listens to
            halves = angles if self._once else [part.chunk(2, dim=-1)[0] for part in angles]
            return torch.cat([*halves], dim=-1)

        cache.turned(positions, waves_at)
