"""How far a network's predictions of tokens are from the original's: divergence and flips."""

import numpy as np
import torch

from spinlab import parallel
from spinlab.metrics.states import Head, States

CHUNK = 2**24  # logits of the original that are there at once


def compare(
    states: torch.Tensor, head: Head, logits: torch.Tensor, logs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(original || network) in nats and whether the likeliest token is another: (n,) each.

    states: (n, hidden), what the original's head read. logits, logs: the network's (n, vocabulary)
    logits in float32, and their log-probabilities. Taken in float32, as many tokens at a time as
    `CHUNK` has room for.
    """
    divergences, flips = [], []
    rows = max(1, CHUNK // len(head.weight))
    for n in range(0, len(states), rows):
        part = slice(n, n + rows)
        original = head.logits(states[part])
        flips.append(original.argmax(-1) != logits[part].argmax(-1))
        of_original = original.log_softmax(-1)
        del original
        difference = of_original - logs[part]
        divergences.append(of_original.exp_().mul_(difference).sum(-1))
    return torch.cat(divergences), torch.cat(flips)


class Divergence:
    """Gather the divergence of every token of a text's windows (n, length) from the original."""

    def __init__(
        self, states: States, label: str, windows: torch.Tensor, device: torch.device
    ) -> None:
        self._states, self._label, self._head = states, label, states.head(device)
        # what other processes see is zero here, so that a sum puts all together
        self._divergences = torch.zeros(len(windows), windows.shape[1] - 1, dtype=torch.float64)
        self._flips = torch.zeros_like(self._divergences)

    def see(self, places: torch.Tensor, logits: torch.Tensor, logs: torch.Tensor) -> None:
        """Compare windows with the original's; shapes are those of `perplexity`'s `See`."""
        for place, *of_network in zip(places.tolist(), logits, logs, strict=True):
            states = self._states.of_window(self._label, place)[:-1].to(self._head.weight.device)
            found = compare(states, self._head, *of_network)
            self._divergences[place], self._flips[place] = (t.cpu().double() for t in found)

    def metrics(self) -> dict[str, float]:
        """Return mean and 99th percentile (interpolated) of the KL per token, and share of flips.

        They are those of all tokens, whatever process saw them.
        """
        divergences = parallel.sum_(self._divergences).numpy()
        flips = parallel.sum_(self._flips)
        return {
            "kl": float(divergences.mean()),
            "kl_p99": float(np.percentile(divergences, 99)),
            "flips": flips.mean().item(),
        }
