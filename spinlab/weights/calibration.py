"""The calibration windows on their way through the decoder layers, batch by batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.families.experts import alone
from spinlab.model.hooks import hidden_states, temporary_hooks
from spinlab.model.modules import map_of

# tokens per forward pass: on a CPU one window, on a GPU enough to keep it busy
_BATCH_TOKENS = {"cpu": 1, "cuda": 8192}
GATED_BYTES = 2**28  # that inputs of down_proj may take, beyond which they are computed again


def batch_of(device: torch.device, length: int) -> int:
    """Return how many windows of so many tokens a device takes at once."""
    return max(1, _BATCH_TOKENS[device.type] // length)


class LayerInputs:
    """Hold what the current decoder layer reads: `batches` of (windows, length, hidden).

    Every layer is called as the model calls it, with the mask and the position embeddings that
    this layer gets for so many windows. Only one layer's activations exist at a time. Once a
    layer's o_proj has been visited, what it reads is kept, and then what it gives, so that neither
    attention nor o_proj is computed again: linears have to stay as they are once a later one is
    visited. What down_proj reads is kept for the way to the next layer, of as many batches as there
    is room for.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, batch: int) -> None:
        """Take token ids (samples, length) to the first layer, `batch` windows at once."""
        self._model, self._layers = model, map_of(model).layers
        self.index = 0
        self.batches: list[torch.Tensor] = []
        self._attended: dict[int, torch.Tensor] = {}  # by batch, what o_proj reads
        self._mixed: dict[int, torch.Tensor] = {}  # in its place, what o_proj gives
        self._gated: dict[int, torch.Tensor] = {}  # what down_proj reads
        self._forms: dict[type, bool] = {}  # whether such attentions return tuples
        self._arguments: dict[int, list[dict[str, Any]]] = {}  # by windows in a batch, by layer
        for ids in windows.split(batch):
            self._enter(model, ids.to(model.device))

    @torch.no_grad()
    def _enter(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        """Keep the first layer's input, and the other arguments of all layers if they are new."""
        known = ids.shape[0] in self._arguments
        arguments = self._arguments.setdefault(ids.shape[0], [])
        layers = self.layers
        first, last = layers[0], layers[0 if known else -1]

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module is first:
                self.batches.append(args[0])
            if not known:
                arguments.append(kwargs)
            if module is last:
                raise _Stop

        with ExitStack() as passed, temporary_hooks() as hooks, suppress(_Stop):
            for layer in layers:  # what they compute does not matter to their other arguments
                passed.enter_context(_instead(layer, lambda x, *args, **kwargs: x))
            hooks += [x.register_forward_pre_hook(keep, with_kwargs=True) for x in layers]
            model(input_ids=ids, use_cache=False)

    def begin(self) -> None:
        """Tell that the current layer is there, if it came just now, and nothing was changed."""

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, or what stands where one is not."""
        return [self._model.get_submodule(layer.path) for layer in self._layers]

    @property
    def layer(self) -> nn.Module:
        """The current layer."""
        return self._model.get_submodule(self._layers[self.index].path)

    @property
    def _attention(self) -> tuple[nn.Module, nn.Module]:
        """The attention of the current layer, and its o_proj."""
        attention = self._layers[self.index].attention
        return self._model.get_submodule(attention.path), self._model.get_submodule(attention.out)

    @property
    def _kept(self) -> int:
        return sum(x.nbytes for x in self._gated.values())

    @property
    def _down(self) -> nn.Module | None:
        """The down_proj of the current layer, if it has one gated MLP."""
        mlp = self._layers[self.index].mlp
        return mlp and self._model.get_submodule(mlp.down)

    def arguments(self, x: torch.Tensor) -> dict[str, Any]:
        """Return what the current layer is called with beside a batch x."""
        return self._arguments[x.shape[0]][self.index]

    def visit(self, linear: nn.Linear, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with what a linear of the current layer is given, batch after batch."""
        for batch in range(len(self.batches)):
            see(self.shown(batch, linear))

    @torch.no_grad()
    def shown(self, batch: int, linear: nn.Linear) -> torch.Tensor:
        """Return what a linear of the current layer is given in a batch.

        What the layer computes after the linear is left out. An expert that the batch has no token
        for is given none: (0, in).
        """
        seen: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise _Stop

        with temporary_hooks() as hooks, alone(self.layer, linear), suppress(_Stop):
            hooks.append(linear.register_forward_pre_hook(stop))
            self._call(batch, linear)
        if linear is self._attention[1]:
            self._attended[batch] = seen[0]
        elif linear is self._down and self._kept + seen[0].nbytes <= GATED_BYTES:
            self._gated[batch] = seen[0]
        return seen[0] if seen else self.batches[batch].new_zeros(0, linear.in_features)

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the current layer to the next; outputs take the place of inputs."""
        for batch in range(len(self.batches)):
            with self._without_gate(batch):
                self.batches[batch] = hidden_states(self._call(batch))
        for kept in (self._attended, self._mixed, self._gated):
            kept.clear()
        self.index += 1

    def _call(self, batch: int, linear: nn.Linear | None = None) -> Any:
        """Call the current layer on a batch, up to a linear or to its end."""
        x = self.batches[batch]
        with self._without_attention(batch, linear):
            return self.layer(x, **self.arguments(x))

    @contextmanager
    def _without_attention(self, batch: int, linear: nn.Linear | None) -> Iterator[None]:
        """Let the current layer's attention go on from what its o_proj reads, if that is kept.

        Where a later linear is called for, o_proj is called but once.
        """
        attention, out = self._attention
        if linear is out:
            self._mixed.pop(batch, None)
        earlier = linear is not out and any(part is linear for part in attention.modules())
        if earlier or (batch not in self._attended and batch not in self._mixed):
            yield
            return
        if type(attention) not in self._forms:  # one pass tells what they return
            with temporary_hooks() as hooks:
                hooks.append(attention.register_forward_hook(self._keep_form))
                yield
            return
        if linear is not out and batch in self._attended:
            self._mixed[batch] = out(self._attended.pop(batch))
        known = self._mixed.get(batch)
        is_tuple = self._forms[type(attention)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            found = out(self._attended[batch]) if known is None else known
            return (found, None) if is_tuple else found

        with _instead(attention, forward):
            yield

    @contextmanager
    def _without_gate(self, batch: int) -> Iterator[None]:
        """Let the current layer's MLP go on from what its down_proj reads, if that is kept."""
        mlp, gated = self._layers[self.index].mlp, self._gated.pop(batch, None)
        if mlp is None or gated is None:
            yield
            return
        down = self._model.get_submodule(mlp.down)
        with _instead(self._model.get_submodule(mlp.path), lambda *args, **kwargs: down(gated)):
            yield

    def _keep_form(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self._forms[type(attention)] = isinstance(output, tuple)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    assert "forward" not in vars(module)
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _Stop(Exception):
    """Leave a forward pass once what was looked for is known."""
