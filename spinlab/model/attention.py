"""Attention as stock models call it: torch's own, or a plain one where a layer asks for more.

Gemma 2 takes cap·tanh(score / cap) for scores, and GPT-OSS lets a learned score of each head join
the softmax, its sink. Torch's fused attention computes neither, and transformers' plain one caps
only with probabilities in float32.
"""

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAIN = "spinlab_plain"
_SCORES = 1 << 24  # that one step makes


def register_plain() -> None:
    """Let models be loaded with `PLAIN` attention."""
    AttentionInterface.register(PLAIN, attend)
    AttentionMaskInterface.register(PLAIN, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what attention gives, (batch, tokens, heads, head_dim), as transformers' functions do.

    query: (batch, heads, tokens, head_dim); key, value: (batch, kv_heads, seen, head_dim); s_aux:
    the sinks of heads, (heads,).
    """
    if not needs_plain(softcap=softcap, s_aux=s_aux):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        shape = query.shape[2], key.shape[2]
        attention_mask = query.new_ones(*shape, dtype=torch.bool).tril()[None, None]
    step = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    found: list[torch.Tensor] = []
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        mask = None if attention_mask is None else attention_mask[..., rows, :]
        scores = _Scores(scaling, softcap, s_aux)
        found.append(_plain_attention(query[:, :, rows], key, value, mask, scores))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def needs_plain(**kwargs: Any) -> bool:
    """Tell whether what stock models call attention with asks for more than torch's own has."""
    return kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap·tanh(scores / cap), or scores of any shape as they are without a cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


class _Scores(NamedTuple):
    """Say how scores are made of products, and what joins them."""

    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    how: _Scores,
) -> torch.Tensor:
    """Attend with capped scores or sinks, every step rounded as in transformers' plain attention.

    A row that sees nothing, of padding, sees all alike, or its sink alone. mask: (batch or 1, 1,
    tokens, seen), true or 0 for what is seen.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # heads that share keys stand side by side
    scores = capped(grouped @ key[:, :, None].mT * how.scaling, how.softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None]
    if how.sinks is None:
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    else:
        weights = _beside_sinks(scores, how.sinks)
    return (weights @ value[:, :, None]).flatten(1, 2)


def _beside_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Return the weights of scores (batch, kv_heads, groups, tokens, seen) beside sinks (heads,).

    In the dtype of the scores, as in the stock model.
    """
    columns = sinks.view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    joined = torch.cat((scores, columns), dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1]
