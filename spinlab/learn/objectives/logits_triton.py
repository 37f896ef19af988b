"""Cross entropy, divergence and their gradient in two passes over the logits, for CUDA.

`spinlab.learn.objectives.logits` is the definition. There each softmax, product and difference goes
through memory in float32, some 130 bytes for each logit of 16 bits; here it is 10.
"""

from typing import Any

import torch

_BLOCK = 2048  # logits that one program holds at once


def full_terms(
    logits: torch.Tensor, labels: torch.Tensor, original: torch.Tensor | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (CE, KL) summed over all rows, float32, and the gradient in the place of the logits.

    logits: (tokens, vocab), overwritten; original: the same of the original model, or None for no
    KL; labels: (tokens, 1). The gradient is q - share·p - (1 - share)·onehot(label), where share is
    0 without `original`.
    """
    logits = logits.contiguous()
    terms = torch.zeros(len(logits), 2, dtype=torch.float32, device=logits.device)
    known = logits if original is None else original.contiguous()
    if len(logits):
        from spinlab.learn.objectives.logits_kernels import loss_kernel  # loads Triton

        launch: Any = loss_kernel[(len(logits),)]
        columns = logits.shape[1]
        block = min(_BLOCK, 1 << (columns - 1).bit_length())
        launch(
            logits, known, labels.contiguous(), terms, share, COLUMNS=columns,
            TEACHER=original is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return terms.sum(0), logits
