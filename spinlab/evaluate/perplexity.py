"""Perplexity over fixed windows, the way the quantization papers report it."""

import math

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int, label: str) -> float:
    """Return exp(mean next-token cross-entropy) over windows (n, length) of token ids.

    Windows are independent; each predicts its tokens from the second on. Losses are taken in
    float32 and averaged over windows in float64.
    """
    total = 0.0
    for part in tqdm(windows.split(batch), desc=label):
        part = part.to(model.device)
        logits = model(input_ids=part).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        total += loss.item() * len(part)
    return math.exp(total / len(windows))
