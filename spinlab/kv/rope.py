"""RoPE on heads, as all families have it: number d turns with number d + rotary_dim/2."""

import torch

Angles = tuple[torch.Tensor, torch.Tensor]  # cos, sin: (batch or 1, tokens, rotary_dim)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (d, d + rotary_dim/2) of x: (batch, heads, tokens, head_dim).

    Every product and the sum are rounded to x's dtype, as stock transformers models do. What lies
    beyond rotary_dim does not turn.
    """
    turning, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    across = torch.cat((-second, first), dim=-1)
    return torch.cat((turning * cos[:, None] + across * sin[:, None], rest), dim=-1)
