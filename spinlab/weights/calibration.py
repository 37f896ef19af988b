"""The calibration windows on their way through the decoder layers, batch by batch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.hooks import hidden_states, temporary_hooks
from spinlab.model.modules import layers_of

# tokens per forward pass: on a CPU one window, on a GPU enough to keep it busy
_BATCH_TOKENS = {"cpu": 1, "cuda": 8192}


def batch_of(device: torch.device, length: int) -> int:
    """Return how many windows of so many tokens a device takes at once."""
    return max(1, _BATCH_TOKENS[device.type] // length)


class LayerInputs:
    """Hold what the current decoder layer reads: `batches` of (windows, length, hidden).

    Every layer is called as the model calls it, with the mask and the position embeddings that
    this layer gets for so many windows. Only one layer's activations exist at a time.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, batch: int) -> None:
        """Take token ids (samples, length) to the first layer, `batch` windows at once."""
        self.layers = layers_of(model)
        self.index = 0
        self.batches: list[torch.Tensor] = []
        self._arguments: dict[int, list[dict[str, Any]]] = {}  # by windows in a batch, by layer
        for ids in windows.split(batch):
            self._enter(model, ids.to(model.device))

    @torch.no_grad()
    def _enter(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        """Keep the first layer's input, and the other arguments of all layers if they are new."""
        known = ids.shape[0] in self._arguments
        arguments = self._arguments.setdefault(ids.shape[0], [])
        first, last = self.layers[0], self.layers[0 if known else -1]

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module is first:
                self.batches.append(args[0])
            if not known:
                arguments.append(kwargs)
            if module is last:
                raise _Stop

        with temporary_hooks() as hooks, suppress(_Stop):
            hooks += [x.register_forward_pre_hook(keep, with_kwargs=True) for x in self.layers]
            model(input_ids=ids, use_cache=False)

    @property
    def layer(self) -> nn.Module:
        """The current layer."""
        return self.layers[self.index]

    def arguments(self, x: torch.Tensor) -> dict[str, Any]:
        """Return what the current layer is called with beside a batch x."""
        return self._arguments[x.shape[0]][self.index]

    def visit(self, linear: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with what a linear of the current layer is given, batch after batch."""
        for x in self.batches:
            self.show(x, linear, see)

    @torch.no_grad()
    def show(self, x: torch.Tensor, linear: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with what a linear of the current layer is given in a batch x.

        What the layer computes after the linear is left out.
        """

        def stop(module: nn.Module, args: tuple) -> None:
            see(args[0])
            raise _Stop

        with temporary_hooks() as hooks, suppress(_Stop):
            hooks.append(linear.register_forward_pre_hook(stop))
            self.layer(x, **self.arguments(x))

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the current layer to the next; outputs take the place of inputs."""
        for i, x in enumerate(self.batches):
            self.batches[i] = hidden_states(self.layer(x, **self.arguments(x)))
        self.index += 1


class _Stop(Exception):
    """Leave a forward pass once what was looked for is known."""
