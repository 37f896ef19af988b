"""Attention as stock models call it: torch's own, or one that caps scores where a layer does.

Gemma 2 takes cap·tanh(score / cap) for scores, which torch's fused attention does not compute, and
transformers' plain one only with probabilities in float32.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAPPED = "spinlab_capped"
_SCORES = 1 << 24  # that one step makes


def register_capped() -> None:
    """Let models be loaded with `CAPPED` attention."""
    AttentionInterface.register(CAPPED, attend)
    AttentionMaskInterface.register(CAPPED, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what attention gives, (batch, tokens, heads, head_dim), as transformers' functions do.

    query: (batch, heads, tokens, head_dim); key, value: (batch, kv_heads, seen, head_dim).
    """
    if softcap is None:
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
        found.append(_capped_attention(query[:, :, rows], key, value, mask, scaling, softcap))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap·tanh(scores / cap), or scores of any shape as they are without a cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with capped scores, every step rounded as in transformers' plain attention.

    A row that sees nothing, of padding, sees all alike. mask: (batch or 1, 1, tokens, seen), true
    or 0 for what is seen.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # heads that share keys stand side by side
    scores = capped(grouped @ key[:, :, None].mT * scaling, softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None]
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)
