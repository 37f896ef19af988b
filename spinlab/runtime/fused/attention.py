"""Attention on the runtime's cache.

Keys and values meet the queries after the round trip that the cache gives them, in the pass that
stores them as in later ones, but for those that stay in floats. One new token per sequence attends
to the packed rows themselves; more of them attend to floats, and so does one to keys whose bias is
apart, where the operation takes none.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from spinlab.kv.bias import BiasScores, waves_of
from spinlab.kv.path import KVPath
from spinlab.kv.rope import Angles, rotary
from spinlab.model.layer import Attention
from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.history import Sides, before_pass, seen_by_pass, seen_by_token
from spinlab.runtime.fused.modules import Reader
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.fused.slots import PlainRows
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize


class IntegerAttention(nn.Module):
    """Stand for a stock attention module and the norm before it, where there is one."""

    def __init__(
        self,
        stock: nn.Module,
        layer: int,
        readers: tuple[Reader, Reader],
        path: KVPath,
        described: Attention,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.qkv, self.out = readers
        self.layer, self.path, self.operations = layer, path, operations
        self.bias = path.biases[layer] if path.biases else None
        self.behind_store = replace(path, r3=None)  # which rotates queries itself
        self.heads, self.kv_heads = described.heads, described.kv_heads
        self.head_dim, self.rope = described.head_dim, described.rope
        self.scaling: float = stock.scaling  # type: ignore[assignment]
        norms = (described.query_norm, described.key_norm)
        self.wide_norms = described.wide_norms
        inside = [path.removeprefix(f"{described.path}.") for path in norms if path]
        self.head_norms = nn.ModuleList(stock.get_submodule(name) for name in inside)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        past_key_values: IntegerCache,
        added: torch.Tensor | None = None,
        **unused: object,
    ) -> tuple[torch.Tensor, None]:
        """Map the stream (batch, tokens, hidden) to what is added to it, or to that sum."""
        q, k, v = self._heads(self.qkv(hidden_states))
        packed = past_key_values.pool.layout.packed(self.layer)
        attend = self._plain if packed is None else self._packed
        cos, sin = position_embeddings
        angles = (cos, sin) if self.rope else (cos[..., :0], sin[..., :0])
        found = attend(q, k, v, angles, past_key_values)
        return self.out(found.transpose(1, 2).flatten(2), added), None

    def _heads(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """Cut one product into queries, keys, values: (batch, tokens, heads, head_dim) each."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = qkv.split(sizes, dim=2)
        if self.wide_norms:  # OLMo-2 norms all heads of queries, and of keys, together
            q, k = self._normed(q, k)
        q, k, v = (part.unflatten(2, (-1, self.head_dim)) for part in (q, k, v))
        if not self.wide_norms:  # Qwen3 norms every head
            q, k = self._normed(q, k)
        return [q, k, v]

    def _normed(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys behind their norms, if they have some."""
        if not self.head_norms:
            return q, k
        of_queries, of_keys = self.head_norms
        return of_queries(q), of_keys(k)

    def _packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        cache: IntegerCache,
    ) -> torch.Tensor:
        """Attend on packed rows: (batch, heads, tokens, head_dim)."""
        slots, tokens = cache.slots, q.shape[1]
        keys, values = slots.rows[self.layer]
        assert isinstance(keys, PackedRows) and isinstance(values, PackedRows)
        floats, past = slots.floats.get(self.layer), self._past(cache)
        r3, returned = self.path.r3_at(self.layer), cache.filled == 0 and tokens > 1
        returned |= past is not None
        query, k_new, v_new = self.operations.store(
            q, k, v, *angles, r3, keys, values, slots.position, returned, floats
        )
        query = self.behind_store.turn_queries(query, self.layer)
        if tokens == 1 and (self.bias is None or self.operations.biased):
            filled = slots.start, slots.length
            bias = self._of_bias(query, cache)
            return self.operations.attend(query, keys, values, *filled, self.scaling, bias, floats)
        if floats is not None:
            new = None if k_new is None or v_new is None else (k_new, v_new)
            return self._in_history(query, new, past, cache)
        if k_new is None or v_new is None:  # a pass that meets earlier tokens
            length = cache.visible
            k_new, v_new = (dequantize(rows, length, q.dtype) for rows in (keys, values))
        return self._floats(query, k_new, v_new, cache)

    def _of_bias(self, query: torch.Tensor, cache: IntegerCache) -> BiasScores | None:
        """Return what a bias that is apart adds to the scores of one token."""
        if self.bias is None:
            return None
        assert cache.waves is not None, "RoPE turned this pass's tokens before"
        return self.bias.scores(query, cache.waves)

    def _plain(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: Angles,
        cache: IntegerCache,
    ) -> torch.Tensor:
        """Attend on rows that torch codes: (batch, heads, tokens, head_dim)."""
        keys, values = cache.slots.rows[self.layer]
        assert isinstance(keys, PlainRows) and isinstance(values, PlainRows)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        query, key = (rotary(x, *angles) for x in (query, key))
        r3, past = self.path.r3_at(self.layer), self._past(cache)
        key = key if r3 is None else r3(key)
        keys.write(key, cache.slots.position)
        values.write(value, cache.slots.position)
        query = self.path.turn_queries(query, self.layer)
        if (floats := cache.slots.floats.get(self.layer)) is not None:
            floats.write(key, value, cache.slots.position)
            return self._in_history(query, (key, value), past, cache)
        length = cache.visible
        return self._floats(query, keys.read(length), values.read(length), cache)

    def _past(self, cache: IntegerCache) -> Sides | None:
        """Return what a pass of several tokens sees in floats of those before it, if any."""
        floats = cache.slots.floats.get(self.layer)
        return None if floats is None or cache.tokens == 1 else before_pass(floats, cache)

    def _in_history(
        self, query: torch.Tensor, new: Sides | None, past: Sides | None, cache: IntegerCache
    ) -> torch.Tensor:
        """Attend where some tokens are in floats.

        new: keys and values of the pass, past: of `_past`; None for one token, which are stored.
        """
        rows, floats = cache.slots.rows[self.layer], cache.slots.floats[self.layer]
        if new is None or past is None:
            found = [seen_by_token(rows, floats, cache)]
        elif cache.is_causal and cache.tokens <= floats.sinks + floats.window:  # none is coded
            return self._floats(query, *new, cache)
        else:
            keys, values = (torch.cat(parts, 2) for parts in zip(past, new, strict=True))
            found = seen_by_pass(rows, floats, (keys, values), cache)
        attended = []
        for part in found:
            waves = None if cache.waves is None else waves_of(cache.waves, part.slots)
            queries = query[:, :, part.queries]
            attended.append(self._attend(queries, part.keys, part.values, part.mask, waves))
        return torch.cat(attended, dim=2)

    def _floats(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache: IntegerCache
    ) -> torch.Tensor:
        return self._attend(query, keys, values, cache.mask(), cache.waves)

    def _attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        waves: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend to floats; waves: RoPE's at the keys, where biases of keys are apart."""
        if self.bias is not None:
            assert waves is not None, "RoPE turned this pass's tokens before"
            keys = self.bias.added(keys, waves)
        grouped = self.heads > self.kv_heads
        if grouped and mask is not None and query.is_cuda and query.shape[2] > 1:
            # with a mask torch has no fused kernel for shared ones, and would store all scores
            groups, grouped = self.heads // self.kv_heads, False
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
            enable_gqa=grouped,
        )
