"""Perplexity over fixed windows, the way the quantization papers report it."""

import math
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab import parallel

# numbers of the windows (n,), their logits and log-probabilities (n, length - 1, vocabulary)
See = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def places_of(count: int, batch: int) -> list[torch.Tensor]:
    """Return the numbers of this process's part of so many windows, batch by batch: (n,) each."""
    mine = parallel.part(torch.arange(count))
    return list(mine.split(batch)) if len(mine) else []


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: torch.Tensor, batch: int, label: str, see: See | None = None
) -> float:
    """Return exp(mean next-token cross-entropy) over windows (n, length) of token ids.

    Windows are independent; each predicts its tokens from the second on. Losses are taken in
    float32 and averaged over windows in float64. Every process takes its part of the windows.
    A loss whose exponential float64 cannot hold gives inf. see: is shown every batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for places in tqdm(places_of(len(windows), batch), desc=label):
        ids = windows[places].to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        logs = logits.log_softmax(-1)
        loss = nn.functional.nll_loss(logs.flatten(0, 1), ids[:, 1:].flatten())
        total += loss.item() * len(ids)
        if see is not None:
            see(places, logits, logs)
        del logits, logs  # they would stand beside the next batch's
    try:
        return math.exp(parallel.sum_(total).item() / len(windows))
    except OverflowError:
        return math.inf
