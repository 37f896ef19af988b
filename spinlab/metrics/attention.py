"""How far a coded history moves scores, weights and outputs of attention, layer by layer.

Nothing adds up over layers: queries, keys and values are those of the network whose cache is exact.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from spinlab.kv.cache import CodedCache, CodedLayer, kv_layer_of, kv_path_of, set_kv_path
from spinlab.kv.path import KVPath
from spinlab.model.attention import attend, capped
from spinlab.model.modules import decoder_of, map_of

_OBSERVED = "spinlab_observed"


class _Exact:
    """Pass keys and values on, and remember them as a codec would have met them."""

    tokens = sequences = bytes = 0

    def round(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = keys, values
        return self.seen


class _Observed:
    """Attend exactly, and sum up what a coded history would change. kept: by layer."""

    def __init__(self, path: KVPath, kept: list[_Exact]) -> None:
        self.path, self.kept = path, kept
        self.sums, self.passes = torch.zeros(3, dtype=torch.float64), 0

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ):
        layer = kv_layer_of(module)
        exact = self.path.uncoded().turn_queries(query, layer)
        queries = exact.float(), self.path.turn_queries(query, layer).float()
        of_scores = kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux")
        self.sums += self._errors(module, queries, key, attention_mask, *of_scores)
        self.passes += 1
        return attend(module, exact, key, value, attention_mask, **kwargs)

    def _errors(
        self,
        module: nn.Module,
        queries: tuple[torch.Tensor, torch.Tensor],
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return square error of scores, KL of weights, relative error of outputs: (3,)."""
        layer, new = kv_layer_of(module), key.shape[2]
        keys, values = self.kept[layer].seen
        history = self.path.history(layer)
        seen = key.new_ones(new, new, dtype=torch.bool).tril()[None, None] if mask is None else mask
        twice, all_seen = history.twice(0, new), history.mask(seen, new, key.device)
        assert all_seen is not None
        found = self.path.new_layer(layer).round(keys, values)
        keys, values = self._of_heads(module, keys, values)
        found = self._of_heads(module, *found)
        shared = partial(_shared, groups=queries[0].shape[1] // key.shape[1])

        # a bias of keys that is apart is part of `key` alone
        coded_key = _twice(key, twice) + (found[0].float() - _twice(keys, twice))
        scores = capped(queries[0] @ shared(key).mT * scaling, softcap)
        coded = capped(queries[1] @ shared(coded_key).mT * scaling, softcap)
        coded = coded.masked_fill(~all_seen, 0)
        folded = coded[..., :new].clone()
        folded[..., twice] += coded[..., new:]
        error = (folded - scores).square().masked_fill(~seen, 0)
        weights, coded_weights, folded_weights = (
            _beside(x.masked_fill(~at, -torch.inf), sinks)
            for x, at in ((scores, seen), (coded, all_seen), (folded, seen))
        )
        output = weights.softmax(-1)[..., :new] @ shared(values)
        coded_output = coded_weights.softmax(-1)[..., : all_seen.shape[-1]] @ shared(found[1])
        return torch.stack(
            (
                error.sum() / seen.expand_as(error).sum(),
                _divergence(weights, folded_weights),
                (coded_output - output).square().sum() / output.square().sum(),
            )
        ).cpu()

    def _of_heads(
        self, module: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of heads: of latent attention, what it makes of cached ones."""
        return module.expand_kv(values, keys) if self.path.latent else (keys, values)


def _twice(x: torch.Tensor, places: slice) -> torch.Tensor:
    """Return rows (..., tokens, d) in float32, with those at these places once more behind them."""
    return torch.cat((x, x[..., places, :]), dim=-2).float()


def _shared(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return what each query head reads of (batch, heads, tokens, d), in float32."""
    return x.float().repeat_interleave(groups, dim=1)


def _beside(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return scores (batch, heads, queries, tokens) and the sinks of heads as one token more."""
    if sinks is None:
        return scores
    sink = sinks.to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), dim=-1)


def _divergence(exact: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(exact || coded) of the weights that scores become, in nats."""
    logs, coded_logs = (s.log_softmax(-1).masked_fill(s.isinf(), 0) for s in (exact, coded))
    return (exact.softmax(-1) * (logs - coded_logs)).sum(-1).mean()


@torch.no_grad()
def attention_errors(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
    """Return means over windows (n, length) of token ids, each by itself, and over layers.

    attention_score   error of scores before softmax, root of the mean square of those seen
    attention_kl      KL(exact || coded) of a query's weights, in nats
    attention_output  |coded - exact|² / |exact|² of what attention gives
    """
    path, before = kv_path_of(model), model.config._attn_implementation
    cache = CodedCache(path.uncoded(), len(map_of(model).layers), store=False)
    kept = [_Exact() for _ in cache.layers]
    for layer, passing in zip(cast(list[CodedLayer], cache.layers), kept, strict=True):
        layer.kept = passing  # type: ignore[assignment]
    observed = _Observed(path, kept)
    AttentionInterface.register(_OBSERVED, observed)
    AttentionMaskInterface.register(_OBSERVED, sdpa_mask)
    model.config._attn_implementation = _OBSERVED
    set_kv_path(model, path.uncoded())
    try:
        for ids in windows.to(model.device):
            decoder_of(model)(input_ids=ids[None], past_key_values=cache)
    finally:
        set_kv_path(model, path)
        model.config._attn_implementation = before
    square, divergence, output = (observed.sums / observed.passes).tolist()
    return {
        "attention_score": square**0.5,
        "attention_kl": divergence,
        "attention_output": output,
    }
