"""Terms on next-token logits: cross entropy and the divergence from the original model."""

from typing import Any

import torch
from torch import Tensor

from spinlab.config import ObjectiveConfig
from spinlab.device import has_kernels
from spinlab.learn.objectives import logits_triton
from spinlab.model.attention import capped


def head_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    config: ObjectiveConfig,
    teacher: tuple[Tensor, Tensor] | None,
    chunk: int,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return cross_entropy·CE + kl·KL of the next token, and both means by name.

    hidden: (batch, length, n), normed; head: (vocab, n), gets no gradient; labels: (batch,
    length) token ids, of which position t predicts the one at t + 1; teacher: hidden states
    and head of the original model, if kl > 0; bias: (vocab,), of both heads, as is the cap of their
    logits (`ModelMap.logit_cap`). Logits exist for `chunk` positions at a time, and nothing of the
    vocabulary's size is kept for the backward pass. Terms of weight 0 are absent.
    """
    assert config.on_logits, "no term looks at logits"
    assert teacher is not None or not config.kl, "kl compares with a teacher"
    student = hidden[:, :-1].flatten(0, 1)
    following = labels[:, 1:].flatten()
    original = None
    if config.kl and teacher is not None:
        states, matrix = (tensor.detach() for tensor in teacher)
        original = states[:, :-1].flatten(0, 1), matrix.to(states.dtype)
    # a Function's apply carries no types
    heads = bias, cap
    loss, terms = _HeadLoss.apply(student, head, following, config, original, chunk, *heads)  # pyright: ignore
    named = dict(zip(("cross_entropy", "kl"), terms, strict=True))
    return loss, {name: term for name, term in named.items() if getattr(config, name)}


class _HeadLoss(torch.autograd.Function):
    """Compute the loss and its gradient in one pass over chunks; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (tokens, n)
        head: Tensor,  # (vocab, n)
        labels: Tensor,  # (tokens,) the token after each
        config: ObjectiveConfig,
        teacher: tuple[Tensor, Tensor] | None,  # (tokens, m), (vocab, m)
        chunk: int,
        bias: Tensor | None,  # (vocab,)
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        head = head.to(hidden.dtype)
        bias = None if bias is None else bias.detach().to(hidden.dtype)
        kept = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(2, dtype=_wide(hidden), device=hidden.device)
        unit = _gradient_unit(config)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = capped(_logits(hidden[rows], head, bias), cap)
            slope = None if cap is None or kept is None else 1 - (logits / cap).square()
            original = None
            if teacher is not None:
                original = capped(_logits(teacher[0][rows], teacher[1], bias), cap)
            terms, gradient = _chunk_terms(logits, labels[rows, None], original, config)
            sums += terms
            if kept is not None:
                # alpha acts on the product's accumulator: bfloat16 is rounded once
                part, alpha = kept[rows], unit / len(hidden)
                gradient = gradient if slope is None else gradient.mul_(slope)
                torch.addmm(part, gradient.to(part.dtype), head, beta=0, alpha=alpha, out=part)
            del logits, slope, original, gradient  # before the next chunk's logits
        ctx.kept = kept
        means = sums / len(hidden)
        ctx.mark_non_differentiable(means)
        return config.cross_entropy * means[0] + config.kl * means[1], means

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kept * gradients[0], *[None] * 7


def _logits(states: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits = states @ head.mT
    return logits if bias is None else logits.add_(bias)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums and probabilities: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _gradient_unit(config: ObjectiveConfig) -> float:
    """Return the weight by which `_chunk_terms` divides its gradient: its softmax has factor 1."""
    if config.kl_top_k:
        return config.cross_entropy or config.kl
    return config.cross_entropy + config.kl


def _chunk_terms(
    logits: Tensor, labels: Tensor, original: Tensor | None, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Return (CE, KL) summed over a chunk and the weighted sum's gradient in logits / unit.

    logits, original: (tokens, vocab), labels: (tokens, 1). With softmaxes q of the logits and p of
    the original's, the gradients are q - onehot(label) and q - p. Logits may be overwritten.
    """
    share = config.kl / _gradient_unit(config)
    if original is None or not config.kl_top_k:
        if has_kernels(logits.device, logits.dtype):
            return logits_triton.full_terms(logits, labels, original, share)
        return _full_terms(logits, labels, original, config, share)
    k = min(config.kl_top_k, original.shape[-1])
    kl, places, pull = _top_k_kl(logits, original, k)
    if config.cross_entropy:
        terms, gradient = _full_terms(logits, labels, None, config, 0.0)
    else:
        terms, gradient = pull.new_zeros(2), torch.zeros_like(logits, dtype=pull.dtype)
    terms[1] = kl
    return terms, gradient.scatter_add_(-1, places, pull.mul_(share))


def _full_terms(
    logits: Tensor, labels: Tensor, original: Tensor | None, config: ObjectiveConfig, share: float
) -> tuple[Tensor, Tensor]:
    """Return (CE, KL) over the whole vocabulary and q - share·p - (1 - share)·onehot."""
    log_q = torch.log_softmax(logits, -1, dtype=_wide(logits))
    terms = log_q.new_zeros(2)
    p = None
    if config.cross_entropy:
        terms[0] = -log_q.gather(-1, labels).sum()
    if original is not None:
        log_p = torch.log_softmax(original, -1, dtype=log_q.dtype)
        p = log_p.exp()
        terms[1] = log_p.sub_(log_q).mul_(p).sum()
    gradient = log_q.exp_()
    if p is not None:
        gradient.sub_(p, alpha=share)
    if config.cross_entropy:
        gradient.scatter_add_(-1, labels, gradient.new_full(labels.shape, share - 1))
    return terms, gradient


def _top_k_kl(logits: Tensor, original: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the KL summed over a chunk, the k places and the gradient there: (tokens, k) each.

    Both distributions are renormalized over the original's k likeliest tokens.
    """
    best, places = original.topk(k, -1, sorted=False)
    log_p = torch.log_softmax(best, -1, dtype=_wide(logits))
    log_q = torch.log_softmax(logits.gather(-1, places), -1, dtype=log_p.dtype)
    p = log_p.exp()
    kl = log_p.sub_(log_q).mul_(p).sum()
    return kl, places, log_q.exp_().sub_(p)
