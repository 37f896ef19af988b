"""Perplexity over fixed windows, the way the quantization papers report it."""

import math

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab import parallel


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int, label: str) -> float:
    """Return exp(mean next-token cross-entropy) over windows (n, length) of token ids.

    Windows are independent; each predicts its tokens from the second on. Losses are taken in
    float32 and averaged over windows in float64. Every process takes its part of the windows.
    A loss whose exponential float64 cannot hold gives inf.
    """
    total = torch.zeros((), dtype=torch.float64)
    mine = parallel.part(windows)
    for ids in tqdm(mine.split(batch) if len(mine) else (), desc=label):
        ids = ids.to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        total += loss.item() * len(ids)
    try:
        return math.exp(parallel.sum_(total).item() / len(windows))
    except OverflowError:
        return math.inf
