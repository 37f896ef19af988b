"""A transformers cache whose layers code what they keep, and the attention that reads it.

Keys and values are rotated and coded in one place, `CodedLayer.update`, after RoPE. A forward
pass that stores nothing (learning, teacher-forced evaluation) goes through the same layer with
`store` off, so the two paths cannot differ.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spinlab.config import KVConfig
from spinlab.errors import InputError
from spinlab.kv.base import CacheLayer, Codec, RowCodec
from spinlab.kv.bias import KeyBias, KeyBiases, Positions, RopeWatch, WavesAt, take_key_biases
from spinlab.kv.codecs import make_codec
from spinlab.kv.layers import RowLayer, rounded
from spinlab.model.modules import decoder_of, map_of
from spinlab.rotation.online import OnlineRotation

ATTENTION = "spinlab_sdpa"
_KV_PATH = "kv_path"  # attribute of an attention module


@dataclass(frozen=True)
class KVPath:
    """Say what keys and values go through: R3 on keys, then a codec each (None = 16-bit).

    Queries are rotated by R3 as keys do, and may make a round trip through a codec of their own.
    apart: biases of keys do not go through the codec (`spinlab.kv.bias`); biases: those that
    `taken_apart` took out of a model for that.
    """

    r3: OnlineRotation | None = None
    keys: Codec | None = None
    values: RowCodec | None = None
    queries: RowCodec | None = None
    apart: bool = False
    biases: KeyBiases = ()

    def turn_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Return queries as they meet the keys of the cache: (batch, heads, tokens, head_dim)."""
        query = query if self.r3 is None else self.r3(query)
        return rounded(query, self.queries)

    def new_layer(self) -> CacheLayer:
        """Return an empty layer: of rows, or what the keys' codec makes."""
        if self.keys is None or self.keys.layer is None:
            return RowLayer(self.keys, self.values)
        return self.keys.layer(self.values)

    @property
    def rows(self) -> tuple[RowCodec | None, RowCodec | None] | None:
        """The codecs of keys and values; None where that of keys keeps whole layers."""
        if self.keys is None or self.keys.layer is None:
            return self.keys, self.values
        return None

    @property
    def bits(self) -> float:
        """Return stored bits per cached number, the mean of keys and values."""
        return sum(codec.bits if codec else 16.0 for codec in (self.keys, self.values)) / 2


class CodedLayer(DynamicLayer):
    """Turn keys by R3 on their way into a layer of the cache, as transformers calls one."""

    def __init__(
        self, path: KVPath, store: bool, bias: KeyBias | None, positions: Positions
    ) -> None:
        super().__init__()
        self.r3, self.store, self.kept = path.r3, store, path.new_layer()
        self.bias, self.positions = bias, positions

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate and code new keys and values, (batch, kv_heads, tokens, head_dim), return all."""
        if self.r3 is not None:
            key_states = self.r3(key_states)
        self.is_initialized |= self.store
        pass_on = self.kept.append if self.store else self.kept.round
        keys, values = pass_on(key_states, value_states)
        if self.bias is not None:
            assert self.positions.waves is not None, "RoPE turned this pass's tokens before"
            keys = self.bias.added(keys, self.positions.waves)
        return keys, values

    def get_seq_length(self) -> int:
        return self.kept.tokens

    def reset(self) -> None:
        """Forget all tokens, which a layer of transformers 5.17 overwrites by zeros and keeps."""
        self.kept.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, -n of them; a positive number is what stays, as 5.17 asks."""
        stay = tokens_to_remove + (self.kept.tokens if tokens_to_remove <= 0 else 0)
        self.kept.crop(max(stay, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give every sequence the past of the one at beam_idx: (batch,), for beam search."""
        if self.kept.tokens:
            self.kept.reorder(beam_idx)


class CodedCache(Cache):
    """A cache of CodedLayers. Pass it to `generate` or let `attach_kv` insert it.

    path: `kv_path_of` the model.
    """

    def __init__(self, path: KVPath, layers: int, store: bool = True) -> None:
        self.biases, self.store, self.positions = path.biases, store, Positions()
        biases = path.biases or (None,) * layers
        super().__init__(layers=[CodedLayer(path, store, b, self.positions) for b in biases])

    def turned(self, positions: torch.Tensor, waves_at: WavesAt) -> None:
        """Take the positions of a pass's tokens (batch or 1, tokens), before they are stored."""
        self.positions.add(positions, self.get_seq_length(), waves_at, keep=self.store)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give every sequence the past of the one at beam_idx: (batch,), for beam search."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self.positions.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self._sequences:
            self.reorder_cache(torch.arange(self._sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences, in this order."""
        if self._sequences:
            self.reorder_cache(torch.arange(self._sequences)[indices.cpu()])

    @property
    def _sequences(self) -> int:
        return cast(CodedLayer, self.layers[0]).kept.sequences

    def stored_bytes(self) -> int:
        """Return the bytes that all layers take, and positions where they are stored."""
        layers = cast(list[CodedLayer], self.layers)
        return sum(layer.kept.bytes for layer in layers) + self.positions.bytes


def kv_path(
    config: KVConfig, head_dim: int, r3: OnlineRotation | None = None, seed: int = 0
) -> KVPath:
    """Build the codecs that a config asks for, with what they draw from a run's seed.

    Raises InputError for codecs that are unknown or do not fit heads of head_dim numbers.
    """
    made = {
        side: make_codec(f"kv.{side}", settings, head_dim, seed)
        for side, settings in config.sides.items()
    }
    values, queries = (_of_rows(f"kv.{side}", made[side]) for side in ("values", "queries"))
    apart = made["keys"] is not None and config.key_bias == "apart"
    return KVPath(r3, made["keys"], values, queries, apart)


def _of_rows(name: str, codec: Codec | None) -> RowCodec | None:
    if codec is None or codec.layer is None:
        return codec
    raise InputError(
        f"{name}.codec keeps whole layers, which only kv.keys can choose: take a codec of rows"
    )


def taken_apart(model: PreTrainedModel, path: KVPath) -> KVPath:
    """Return a path with the biases that it keeps apart, which the model's linears lose."""
    return replace(path, biases=take_key_biases(model, path.r3)) if path.apart else path


def attach_kv(model: PreTrainedModel, path: KVPath, store: bool) -> None:
    """Make a model rotate its queries and keys and code its cache, in place.

    With `store` a forward pass fills a CodedCache as `generate` needs it; without, keys and
    values only make the round trip. A CodedCache that the caller passes is used as it is. Linears
    that hold biases in forms of their own are put in afterwards.
    """
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION
    path = taken_apart(model, path)
    set_kv_path(model, path)
    watch = RopeWatch(model) if path.biases else None
    # what the hook holds, instead of the model: that would keep itself alive
    first = _attention_modules(model)[0]
    insert = partial(_insert, first, len(map_of(model).layers), store, watch)
    decoder_of(model).register_forward_pre_hook(insert, with_kwargs=True)


def _insert(
    first: nn.Module,
    layers: int,
    store: bool,
    watch: RopeWatch | None,
    decoder: nn.Module,
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict]:
    """Give a pass of the decoder a CodedCache. first: any attention, which knows the path."""
    cache, path = kwargs.get("past_key_values"), cast(KVPath, getattr(first, _KV_PATH))
    if not isinstance(cache, CodedCache):
        if cache is not None and cache.get_seq_length():
            raise InputError(f"a filled {type(cache).__name__} cannot be coded: begin without one")
        cache = CodedCache(path, layers, store and kwargs.get("use_cache") is not False)
    elif cache.biases != path.biases:
        raise InputError(
            "the cache does not have the key biases of this model: begin with "
            "CodedCache(kv_path_of(model), layers)"
        )
    if watch is not None:
        watch.begin(cache)
    return args, {**kwargs, "past_key_values": cache}


def set_kv_path(model: PreTrainedModel, path: KVPath) -> None:
    """Change what keys, values and queries of a model go through, in place."""
    for attention in _attention_modules(model):
        setattr(attention, _KV_PATH, path)


def kv_path_of(model: PreTrainedModel) -> KVPath:
    """Return what `set_kv_path` set."""
    return getattr(_attention_modules(model)[0], _KV_PATH)


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_submodule(layer.attention.path) for layer in map_of(model).layers]


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args, **kwargs):
    """Rotate queries as the cache rotated keys, then attend as transformers' sdpa does."""
    path: KVPath = getattr(module, _KV_PATH)
    query = path.turn_queries(query)
    if _has_fused_kernel_ungrouped(query, key):
        return attend_ungrouped(module, query, key, *args, **kwargs)
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


def attend_ungrouped(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
):
    """Attend with every head's own copy of the keys and values that it shares with others."""
    groups = query.shape[1] // key.shape[1]
    key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    alone: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(alone, query, key, value, *args, **kwargs)


def _has_fused_kernel_ungrouped(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Tell whether torch has a fused kernel for a head's own keys, but none for shared ones.

    So it is for several tokens in float32 on a GPU; it would store all scores, (batch, heads,
    tokens, tokens), several times over. The gradient of that kernel is another one each time,
    though: what learns goes the slow way.
    """
    shared = query.shape[1] > key.shape[1] and not torch.is_grad_enabled()
    return shared and query.is_cuda and query.dtype == torch.float32 and query.shape[2] > 1
