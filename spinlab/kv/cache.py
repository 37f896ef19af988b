"""A transformers cache whose rows are coded, and the attention that reads it.

Keys and values are rotated and coded in one place, `CodedLayer.update`, after RoPE. A forward
pass that stores nothing (learning, teacher-forced evaluation) goes through the same layer with
`store` off, so the two paths cannot differ.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spinlab.config import KVConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import StraightThrough, check_group
from spinlab.kv.codec import AffineCodec
from spinlab.model.seams import decoder_of, dimensions_of, family_of, layers_of
from spinlab.rotation.online import OnlineRotation

ATTENTION = "spinlab_sdpa"
_KEPT = 1 << 18  # decoded numbers that a layer keeps at most
_KV_PATH = "kv_path"  # attribute of an attention module


@dataclass(frozen=True)
class KVPath:
    """Say what keys and values go through: R3 on keys, then a codec each (None = 16-bit).

    Queries turn with R3 as keys do, and may make a round trip through a codec of their own.
    """

    r3: OnlineRotation | None
    keys: AffineCodec | None
    values: AffineCodec | None
    queries: AffineCodec | None = None

    def turn_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Return queries as they meet the keys of the cache: (batch, heads, tokens, head_dim)."""
        query = query if self.r3 is None else self.r3(query)
        return _round(query, self.queries)


def _round(x: torch.Tensor, codec: AffineCodec | None) -> torch.Tensor:
    return x if codec is None else StraightThrough.apply(x, codec.round)  # type: ignore[no-any-return]


class CodedLayer(DynamicLayer):
    """Keep one layer's keys and values as coded rows: (batch, heads, tokens, row_bytes) uint8.

    While they are few, decoded ones are kept beside them, so that a step decodes its own only.
    """

    def __init__(self, path: KVPath, store: bool) -> None:
        super().__init__()
        self.path, self.store = path, store
        self._decoded: torch.Tensor | None = None  # all rows of `_decoded_keys` and their values
        self._decoded_keys: torch.Tensor | None = None

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate and code the new rows and return all rows, decoded."""
        if self.path.r3 is not None:
            key_states = self.path.r3(key_states)
        if not self.store:
            return _round(key_states, self.path.keys), _round(value_states, self.path.values)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        codec = self.path.keys
        if codec is None or codec != self.path.values or key_states.shape != value_states.shape:
            self.keys = _append(self.keys, _coded(key_states, codec))
            self.values = _append(self.values, _coded(value_states, self.path.values))
            return self._read(self.keys, codec), self._read(self.values, self.path.values)
        keys, values = self._update_both(torch.stack((key_states, value_states)), codec)
        return keys, values

    def _update_both(self, new: torch.Tensor, codec: AffineCodec) -> torch.Tensor:
        """Code new keys and values, stacked, and return all, decoded.

        Both go together because for a token of decoding calls cost more than their work.
        """
        coded, rounded = codec.encode_and_round(new)
        before = self._decoded if self._decoded_keys is self.keys else None
        self.keys, self.values = _append(self.keys, coded[0]), _append(self.values, coded[1])
        if before is None:
            decoded = codec.decode(torch.stack((self.keys, self.values)), self.dtype)
        else:
            decoded = torch.cat((before, rounded), dim=-2)
        # rows that were cropped or reordered since are another tensor
        keep = decoded.numel() <= _KEPT
        self._decoded, self._decoded_keys = (decoded, self.keys) if keep else (None, None)
        return decoded

    def _read(self, rows: torch.Tensor, codec: AffineCodec | None) -> torch.Tensor:
        return rows if codec is None else codec.decode(rows, self.dtype)

    def reset(self) -> None:
        """Forget all rows, which a layer of transformers 5.17 overwrites by zeros and keeps."""
        self.keys = self.values = self._decoded = self._decoded_keys = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        rows = self.keys
        return 0 if rows is None or rows.numel() == 0 else rows.shape[-2]


def _coded(x: torch.Tensor, codec: AffineCodec | None) -> torch.Tensor:
    return x if codec is None else codec.encode(x)


def _append(rows: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if rows is None or rows.numel() == 0 else torch.cat([rows, new], dim=-2)


class CodedCache(Cache):
    """A cache of CodedLayers. Pass it to `generate` or let `attach_kv` insert it."""

    def __init__(self, path: KVPath, layers: int, store: bool = True) -> None:
        super().__init__(layers=[CodedLayer(path, store) for _ in range(layers)])

    def stored_bytes(self) -> int:
        """Return the bytes that the stored rows take."""
        layers = cast(list[CodedLayer], self.layers)
        rows = [t for layer in layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in rows if t is not None)


def kv_path(model: PreTrainedModel, r3: OnlineRotation | None, config: KVConfig | None) -> KVPath:
    """Build the codecs that a config asks for. Raises InputError for unfitting groups."""
    if config is None:
        return KVPath(r3, None, None)
    width = dimensions_of(model.config).head_dim
    check_group("kv.group_size", config.group_size, width, "one attention head")

    def codec(bits: int, clip_ratio: float) -> AffineCodec | None:
        if bits == 16:
            return None
        return AffineCodec(
            IntegerFormat(bits, config.symmetric), width, config.group_size, clip_ratio
        )

    clip = config.clip_ratio
    v_clip = clip if config.v_clip_ratio is None else config.v_clip_ratio
    return KVPath(
        r3, codec(config.k_bits, clip), codec(config.v_bits, v_clip), codec(config.q_bits, clip)
    )


def kv_bits(model: PreTrainedModel, config: KVConfig) -> float:
    """Return stored bits per cached number, the mean of keys and values."""
    path = kv_path(model, None, config)
    bits = [codec.bits if codec else 16.0 for codec in (path.keys, path.values)]
    return sum(bits) / 2


def attach_kv(model: PreTrainedModel, path: KVPath, store: bool) -> None:
    """Make a model rotate its queries and keys and code its cache, in place.

    With `store` a forward pass fills a CodedCache as `generate` needs it; without, keys and
    values only make the round trip. A CodedCache that the caller passes is used as it is.
    """
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION
    layers = layers_of(model)
    set_kv_path(model, path)
    attention = family_of(model.config.model_type).attention
    # what the hook holds, instead of the model: that would keep itself alive
    count, first = len(layers), layers[0].get_submodule(attention)

    def insert(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, CodedCache):
            return args, kwargs
        if cache is not None and cache.get_seq_length():
            raise InputError(f"a filled {type(cache).__name__} cannot be coded: begin without one")
        keep = store and kwargs.get("use_cache") is not False
        path: KVPath = getattr(first, _KV_PATH)
        return args, {**kwargs, "past_key_values": CodedCache(path, count, keep)}

    decoder_of(model).register_forward_pre_hook(insert, with_kwargs=True)


def set_kv_path(model: PreTrainedModel, path: KVPath) -> None:
    """Change what keys, values and queries of a model go through, in place."""
    for layer in layers_of(model):
        attention = layer.get_submodule(family_of(model.config.model_type).attention)
        setattr(attention, _KV_PATH, path)


def kv_path_of(model: PreTrainedModel) -> KVPath:
    """Return what `set_kv_path` set."""
    family = family_of(model.config.model_type)
    return getattr(layers_of(model)[0].get_submodule(family.attention), _KV_PATH)


def _attention(module: nn.Module, query: torch.Tensor, *args, **kwargs):
    """Turn queries as the cache turned keys, then attend as transformers' sdpa does."""
    path: KVPath = getattr(module, _KV_PATH)
    return sdpa_attention_forward(module, path.turn_queries(query), *args, **kwargs)
