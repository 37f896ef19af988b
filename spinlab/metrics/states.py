"""The original's logits for windows of text, kept as what its head reads.

A row of a head's input is a vocabulary's width less than a row of logits, and one product gives
the logits back as they were. The original then need not run, nor stand, beside what is compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.metrics.perplexity import See
from spinlab.model.attention import capped
from spinlab.model.modules import head_of, map_of
from spinlab.tensors import write_tensors


@dataclass(frozen=True)
class Head:
    """Make logits of what a head reads.

    weight: (vocabulary, hidden); bias: (vocabulary,); divisor: of what both give; cap: of what
    that leaves (`ModelMap.logit_cap`), 0 where there is none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    divisor: float = 1.0
    cap: float = 0.0

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., vocabulary) of states (..., hidden), in float32."""
        logits = nn.functional.linear(states, self.weight, self.bias)
        logits = logits if self.divisor == 1 else logits / self.divisor
        return capped(logits, self.cap or None).float()


@dataclass(frozen=True)
class States:
    """Know where they lie: the head in one file, every window in its own."""

    folder: Path

    @contextmanager
    def keeping(self, model: PreTrainedModel, label: str) -> Iterator[See]:
        """Yield what keeps the states of the windows that a perplexity goes through.

        Each of several processes writes its own windows, and the first one the head.
        """
        self._file(label, 0).parent.mkdir(parents=True, exist_ok=True)
        head, read = head_of(model), []
        if parallel.is_main():
            weight = head.weight.detach().cpu().contiguous()
            numbers = {
                "divisor": map_of(model).logit_divisor,
                "cap": map_of(model).logit_cap or 0.0,
            }
            behind = {n: torch.tensor(x, dtype=torch.float64) for n, x in numbers.items()}
            of_bias = {} if head.bias is None else {"bias": head.bias.detach().cpu()}
            write_tensors(self._head, {"weight": weight, **behind, **of_bias})

        def keep(places: torch.Tensor, logits: torch.Tensor, logs: torch.Tensor) -> None:
            for place, states in zip(places.tolist(), read.pop().cpu(), strict=True):
                write_tensors(self._file(label, place), {"states": states.clone()})

        hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            yield keep
        finally:
            hook.remove()

    def head(self, device: torch.device) -> Head:
        """Load the original's head."""
        kept = load_file(self._head)
        bias = kept["bias"].to(device) if "bias" in kept else None
        behind = kept["divisor"].item(), kept["cap"].item()
        return Head(kept["weight"].to(device), bias, *behind)

    def of_window(self, label: str, place: int) -> torch.Tensor:
        """Load what the head read of a window: (length, hidden)."""
        return load_file(self._file(label, place))["states"]

    @property
    def _head(self) -> Path:
        return self.folder / "head.safetensors"

    def _file(self, label: str, place: int) -> Path:
        return self.folder / "states" / label / f"{place:06d}.safetensors"
