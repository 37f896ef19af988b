"""How long a network writes what the original writes, where each takes its likeliest token."""

import torch
from transformers import PreTrainedModel

from spinlab.kv.cache import storing_cache

PROMPTS = 8  # windows of a text that are continued


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the likeliest next tokens (n, tokens) behind prompts (n, length), one after another.

    An end of text is a token as others are.
    """
    step, cache = prompts.to(model.device), storing_cache(model)
    found = []
    for _ in range(tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step, cache = out.logits[:, -1:].float().argmax(-1), out.past_key_values
        found.append(step)
    return torch.cat(found, dim=1).cpu()


def first_divergence(original: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean number of tokens before the first that differs; both are (n, tokens)."""
    same = (original == other).long().cumprod(dim=1)
    return same.sum(dim=1).double().mean().item()
