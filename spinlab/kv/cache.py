"""A transformers cache whose layers code what they keep, and the attention that reads it.

Keys and values are rotated and coded in one place, `CodedLayer.update`, after RoPE. A forward
pass that stores nothing (learning, teacher-forced evaluation) goes through the same layer with
`store` off, so the two paths cannot differ.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from spinlab.errors import InputError
from spinlab.kv.bias import KeyBias, Positions, RopeWatch, WavesAt
from spinlab.kv.history import PassMasks
from spinlab.kv.path import KVPath, taken_apart
from spinlab.model.attention import attend, needs_plain
from spinlab.model.modules import decoder_of, map_of

ATTENTION = "spinlab_sdpa"
# attributes of an attention module, the first and the last of the decoder too
_KV_PATH, _KV_LAYER, _KV_MASKS = "kv_path", "kv_layer", "kv_masks"


class CodedLayer(DynamicLayer):
    """Turn keys by R3 on their way into a layer of the cache, as transformers calls one.

    Of latent attention transformers hands over the latent first, then the key that RoPE has turned:
    the latter is the key here, and the latent, of which values are made, the value.
    """

    def __init__(
        self, path: KVPath, index: int, store: bool, bias: KeyBias | None, positions: Positions
    ) -> None:
        super().__init__()
        self.r3, self.store, self.kept = path.r3_at(index), store, path.new_layer(index)
        self.history, self.bias, self.positions = path.history(index), bias, positions
        self.latent = bool(path.latent)

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate and code new keys and values, (batch, kv_heads, tokens, head_dim), return all.

        Tokens that stand twice come again behind all (`spinlab.kv.history`).
        """
        if not self.latent:
            return self._update(key_states, value_states)
        key, latent = self._update(value_states, key_states)
        return latent, key

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past, new = self.kept.tokens, key_states.shape[-2]
        if self.r3 is not None:
            key_states = self.r3(key_states)
        self.is_initialized |= self.store
        pass_on = self.kept.append if self.store else self.kept.round
        keys, values = pass_on(key_states, value_states)
        if self.bias is not None:
            waves = self.positions.waves
            assert waves is not None, "RoPE turned this pass's tokens before"
            if keys.shape[-2] > waves.shape[1]:
                waves = torch.cat((waves, waves[:, self.history.twice(past, new)]), dim=1)
            keys = self.bias.added(keys, waves)
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
        super().__init__(
            layers=[CodedLayer(path, n, store, b, self.positions) for n, b in enumerate(biases)]
        )

    def turned(self, positions: torch.Tensor, waves_at: WavesAt) -> None:
        """Take the positions of a pass's tokens (batch or 1, tokens), before they are stored."""
        self.positions.add(positions, self.get_seq_length(), waves_at, keep=self.store)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give every sequence the past of the one at beam_idx: (batch,), for beam search."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self.positions.reorder(beam_idx)

    def crop(self, *args: int, **kwargs: int) -> None:
        """Forget tokens as layers do, and where they were."""
        super().crop(*args, **kwargs)
        self.positions.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.positions.crop(0)

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


def attach_kv(model: PreTrainedModel, path: KVPath, store: bool) -> None:
    """Make a model rotate its queries and keys and code its cache, in place.

    With `store` a forward pass fills a CodedCache as `generate` needs it; without, keys and
    values only make the round trip. A CodedCache that the caller passes is used as it is. Linears
    that hold biases in forms of their own are put in afterwards. Raises InputError for a model
    whose cache is coded.
    """
    if is_coded(model):
        raise InputError(
            "the model's cache is coded already, and its biases of keys are apart: begin with a "
            "fresh copy of the model, or change what its cache goes through with set_kv_path"
        )
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION
    path, masks = taken_apart(model, path), PassMasks()
    setattr(decoder_of(model), _KV_MASKS, masks)
    set_kv_path(model, path)
    watch = RopeWatch(model) if path.biases else None
    insert = partial(_insert, len(map_of(model).layers), store, watch)
    decoder_of(model).register_forward_pre_hook(insert, with_kwargs=True)
    decoder_of(model).register_forward_hook(partial(_end_pass, masks), always_call=True)


def _insert(
    layers: int,
    store: bool,
    watch: RopeWatch | None,
    decoder: nn.Module,
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict]:
    """Give a pass of the decoder, which knows the path, a CodedCache."""
    cache, path = kwargs.get("past_key_values"), cast(KVPath, getattr(decoder, _KV_PATH))
    if not isinstance(cache, CodedCache):
        if cache is not None and cache.get_seq_length():
            raise InputError(f"a filled {type(cache).__name__} cannot be coded: begin without one")
        cache = CodedCache(path, layers, store and kwargs.get("use_cache") is not False)
    elif cache.biases != path.biases:
        raise InputError(
            "the cache does not have the key biases of this model: begin with "
            "CodedCache(kv_path_of(model), layers)"
        )
    if path.counts:
        _check_starts(kwargs.get("attention_mask"))
    if watch is not None:
        watch.begin(cache)
    return args, {**kwargs, "past_key_values": cache}


def _end_pass(masks: PassMasks, decoder: nn.Module, args: tuple, output: Any) -> None:
    masks.clear()


def _check_starts(mask: torch.Tensor | None) -> None:
    """Refuse padding on the left, where runs and sinks are counted from the first slot."""
    if mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all()):
        raise InputError(
            "the cache counts sinks and runs of tokens from the first slot, which the attention "
            "mask says is padding: pad on the right, or pass sequences of one length"
        )


def set_kv_path(model: PreTrainedModel, path: KVPath) -> None:
    """Change what keys, values and queries of a model go through, in place."""
    latent = map_of(model).latent
    path = replace(path, latent=0 if latent is None else latent.turned)
    decoder = decoder_of(model)
    setattr(decoder, _KV_PATH, path)
    for index, attention in _attention_modules(model).items():
        setattr(attention, _KV_PATH, path)
        setattr(attention, _KV_LAYER, index)
        setattr(attention, _KV_MASKS, getattr(decoder, _KV_MASKS))


def is_coded(model: PreTrainedModel) -> bool:
    """Tell whether `attach_kv` was there."""
    return hasattr(decoder_of(model), _KV_PATH)


def kv_path_of(model: PreTrainedModel) -> KVPath:
    """Return what `set_kv_path` set."""
    return getattr(decoder_of(model), _KV_PATH)


def kv_layer_of(attention: nn.Module) -> int:
    """Return which layer an attention of a coded model is of."""
    return getattr(attention, _KV_LAYER)


def storing_cache(model: PreTrainedModel) -> CodedCache | None:
    """Return an empty cache that stores what a coded model's passes code; None for other models."""
    return CodedCache(kv_path_of(model), len(map_of(model).layers)) if is_coded(model) else None


def _attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the attentions that are there, by their layers."""
    there = map_of(model).there
    return {index: model.get_submodule(layer.attention.path) for index, layer in there.items()}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
):
    """Rotate queries as the cache rotated keys, then attend as stock models do."""
    path: KVPath = getattr(module, _KV_PATH)
    layer: int = getattr(module, _KV_LAYER)
    history, query = path.history(layer), path.turn_queries(query, layer)
    if not history.codes_all and query.shape[2] > 1:
        masks: PassMasks = getattr(module, _KV_MASKS)
        attention_mask = masks.of(history, attention_mask, query.shape[2], query.device)
    alone = not needs_plain(**kwargs) and _has_fused_kernel_ungrouped(query, key)
    found = attend_ungrouped if alone else attend
    return found(module, query, key, value, attention_mask, **kwargs)


def attend_ungrouped(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
):
    """Attend with every head's own copy of the keys and values that it shares with others."""
    groups = query.shape[1] // key.shape[1]
    key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    alone: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return attend(alone, query, key, value, *args, **kwargs)


def _has_fused_kernel_ungrouped(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Tell whether torch has a fused kernel for a head's own keys, but none for shared ones.

    So it is for several tokens in float32 on a GPU; it would store all scores, (batch, heads,
    tokens, tokens), several times over. The gradient of that kernel is another one each time,
    though: what learns goes the slow way.
    """
    shared = query.shape[1] > key.shape[1] and not torch.is_grad_enabled()
    return shared and query.is_cuda and query.dtype == torch.float32 and query.shape[2] > 1
