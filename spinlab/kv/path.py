"""What the keys, values and queries of a model go through, made of a run's settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from spinlab.config import CodecConfig, KVConfig
from spinlab.config.kv import KEPT, Kept, Placed
from spinlab.errors import InputError
from spinlab.kv.base import CacheLayer, RowCodec
from spinlab.kv.bias import KeyBiases, take_key_biases
from spinlab.kv.codecs import make_codec
from spinlab.kv.history import History, HistoryLayer, run_of
from spinlab.kv.layers import RowLayer, rounded
from spinlab.rotation.online import LayerRotations, OnlineRotation
from spinlab.rotation.rotations import kv_clip_key


class Sides(NamedTuple):
    """Hold the codecs of one layer; None for what stays in 16 bits."""

    keys: RowCodec | None
    values: RowCodec | None


@dataclass(frozen=True)
class KVPath:
    """Say what keys and values go through: R3 on keys, then a codec each (None = 16-bit).

    Queries are rotated by R3 as keys do, and may make a round trip through a codec of their own.
    R3 is one for all layers, or one for each.
    apart: biases of keys do not go through the codec (`spinlab.kv.bias`); biases: those that
    `taken_apart` took out of a model for that. layers: the codecs of every layer, () where all have
    the same. sinks, window: of a layer that is coded, the first and the newest tokens in 16 bits.
    latent: the cache holds latents as its values, and as its keys what queries meet with so many of
    their last numbers, as `set_kv_path` finds it in the model; 0 where it holds those of heads.
    """

    r3: OnlineRotation | LayerRotations | None = None
    keys: RowCodec | None = None
    values: RowCodec | None = None
    queries: RowCodec | None = None
    apart: bool = False
    biases: KeyBiases = ()
    layers: tuple[Sides, ...] = ()
    sinks: int = 0
    window: int = 0
    latent: int = 0

    def r3_at(self, layer: int) -> OnlineRotation | None:
        """Return what turns keys and queries of a layer."""
        return None if self.r3 is None else self.r3.at(layer)

    def turned_by(self, r3: OnlineRotation | LayerRotations | None) -> "KVPath":
        """Return the same path with another R3, which turns biases that are apart too."""
        biases = tuple(
            bias and bias.turned_by(None if r3 is None else r3.at(layer))
            for layer, bias in enumerate(self.biases)
        )
        return replace(self, r3=r3, biases=biases)

    def sides(self, layer: int) -> Sides:
        """Return the codecs of a layer."""
        return self.layers[layer] if self.layers else Sides(self.keys, self.values)

    def history(self, layer: int) -> History:
        """Say which tokens of a layer are coded."""
        sides = self.sides(layer)
        if sides == (None, None):
            return History()
        return History(self.sinks, self.window, run_of(*sides))

    def new_layer(self, layer: int = 0) -> CacheLayer:
        """Return an empty layer."""
        history = self.history(layer)
        if history.codes_all:
            return RowLayer(*self.sides(layer))
        return HistoryLayer(history, *self.sides(layer))

    def turn_queries(self, query: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Return queries as they meet the keys of a layer: (batch, heads, tokens, head_dim)."""
        r3 = self.r3_at(layer)
        return rounded(query if r3 is None else self.on_turned(r3, query), self.queries)

    def on_turned(
        self, change: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor
    ) -> torch.Tensor:
        """Change those numbers of queries (..., head_dim) that meet what R3 turns."""
        if not self.latent:
            return change(query)
        rest, turned = query.split([query.shape[-1] - self.latent, self.latent], dim=-1)
        return torch.cat((rest, change(turned)), dim=-1)

    def uncoded(self) -> "KVPath":
        """Return the path without any codec."""
        plain = KVPath()
        exact = ("keys", "values", "queries", "layers", "sinks", "window")
        return replace(self, **{name: getattr(plain, name) for name in exact})

    @property
    def histories(self) -> list[History]:
        """Say which tokens are coded, of all layers that differ."""
        return [self.history(layer) for layer in range(max(len(self.layers), 1))]

    @property
    def codes_all(self) -> bool:
        """Tell whether every token of every layer is coded at once, where any is."""
        return all(history.codes_all for history in self.histories)

    @property
    def counts(self) -> bool:
        """Tell whether it matters which slot is a sequence's first."""
        return any(history.counts for history in self.histories)


def kv_path(
    config: KVConfig,
    head_dim: int | Mapping[str, int],
    r3: OnlineRotation | LayerRotations | None = None,
    seed: int = 0,
    layers: Sequence[str] = (),
    kv_clips: Mapping[str, float] | None = None,
) -> KVPath:
    """Build the codecs that a config asks for, with what they draw from a run's seed.

    head_dim: of a head, or by side (keys, values, queries) where sides differ. layers: full names
    of all attentions, where codecs may differ by layer. kv_clips: learned clip ratios by layer and
    side (`kv_clip_key`), which go before the config's. Raises InputError for codecs that are
    unknown or do not fit such heads, and for layers that are not there.
    """

    known: dict[tuple[str, CodecConfig], RowCodec | None] = {}  # equal settings have one codec
    widths = dict.fromkeys(config.sides, head_dim) if isinstance(head_dim, int) else head_dim

    def made(side: str, placed: Placed) -> RowCodec | None:
        place, settings = placed
        if (side, settings) not in known:
            known[side, settings] = make_codec(f"kv.{side}", settings, widths[side], seed, place)
        return known[side, settings]

    keys, values, queries = (made(side, config.codecs(side)[0]) for side in config.sides)
    if queries is not None and queries.run > 1:
        raise InputError(
            f"kv.queries.codec={config.queries.codec} codes runs of tokens, and queries come one "
            "by one: take affine"
        )
    by_layer: tuple[Sides, ...] = ()
    if config.varies or kv_clips:
        _check_layers(config, layers)
        at = partial(_codec_at, config, list(layers), kv_clips or {})
        by_layer = tuple(
            Sides(*(made(side, at(side, n)) for side in KEPT)) for n in range(len(layers))
        )
    apart = config.codes("keys") and config.key_bias == "apart"
    kept = config.sinks, config.window
    return KVPath(r3, keys, values, queries, apart, (), by_layer, *kept)


def _codec_at(
    config: KVConfig, names: list[str], clips: Mapping[str, float], side: Kept, layer: int
) -> Placed:
    """Return what a side of a layer is coded with, within its learned range if it has one."""
    place, found = config.codec_at(side, layer, names)
    ratio = clips.get(kv_clip_key(layer, side), found.clip_ratio)
    return place, replace(found, clip_ratio=ratio)


def _check_layers(config: KVConfig, names: Sequence[str]) -> None:
    """Raise InputError for patterns that change no layer, and for more layers than there are."""
    assert names, "settings that go by layer need the layers' names"
    coded = names[config.first_layers : len(names) - config.last_layers]
    for pattern in (override.pattern for override in config.overrides):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if matched and not set(matched) & set(coded):
            raise InputError(
                f"kv.overrides: the pattern {pattern!r} matches only layers that kv.first_layers="
                f"{config.first_layers} and kv.last_layers={config.last_layers} keep in 16 bits"
            )
        if not matched:
            raise InputError(
                f"kv.overrides: the pattern {pattern!r} matches no attention of the model: their "
                f"names are like {names[0]}"
            )
    for name in ("first_layers", "last_layers"):
        if (found := getattr(config, name)) > len(names):
            raise InputError(f"kv.{name}={found} is more than the {len(names)} layers of the model")


def taken_apart(model: PreTrainedModel, path: KVPath) -> KVPath:
    """Return a path with the biases that it keeps apart, which the model's linears lose."""
    return replace(path, biases=take_key_biases(model, path.r3)) if path.apart else path
