"""A network as the parts that are there at once: whole, or a layer at a time (offload).

Whoever runs windows through a network goes through its parts, in order, and calls each with every
batch. What a layer gives is kept in the host's memory and is what the next one reads, so that a
device holds one layer, and the numbers are those of the whole network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.model.hooks import hidden_states, temporary_hooks
from spinlab.model.modules import decoder_of, layers_of, map_of
from spinlab.model.parts import Passage

Load = Callable[[], PreTrainedModel]  # gives an original, or a part of it
Make = Callable[[Load], PreTrainedModel]  # makes a network of it


def as_it_is(load: Load) -> PreTrainedModel:
    """Make the original itself."""
    return load()


class Network(ABC):
    """Give the parts of a network, each as a model with a map of what is there."""

    part: Callable[[int | None], PreTrainedModel] | None = None

    @abstractmethod
    def base(self) -> PreTrainedModel:
        """Return the network where it is whole, else its ends; `part` returns layers then."""

    @abstractmethod
    def parts(
        self, batches: Sequence[torch.Tensor], use_cache: bool | None = None
    ) -> Iterator[PreTrainedModel]:
        """Yield the parts that `batches` of token ids (windows, tokens) go through.

        A part is there until the next is asked for, and an empty name then. It is called with the
        batches, in order and each once, by whoever wants to see something of it; what nobody does
        is done with `use_cache`, as transformers take it. Only the last part gives logits.
        """

    def pieces(self) -> Iterator[PreTrainedModel]:
        """Yield the parts for what they hold, the ends last; nothing runs through them."""
        yield self.base()

    def last(
        self, batches: Sequence[torch.Tensor], use_cache: bool | None = None
    ) -> PreTrainedModel:
        """Return the part that gives the logits of batches when it is called with them."""
        found = None
        for part in self.parts(batches, use_cache):
            found = part
        assert found is not None, "a network has parts"
        return found


class Resident(Network):
    """A network that is there as a whole, as long as a part is. make: returns it."""

    def __init__(self, make: Load) -> None:
        self._make = make

    def base(self) -> PreTrainedModel:
        """Return the network."""
        return self._make()

    def parts(
        self, batches: Sequence[torch.Tensor], use_cache: bool | None = None
    ) -> Iterator[PreTrainedModel]:
        """Yield the network."""
        yield self._make()


def network_of(made: Network | Load) -> Network:
    """Return a network, or that of what makes a whole one."""
    return made if isinstance(made, Network) else Resident(made)


class Streamed(Network):
    """A network of so many layers that come one by one, and its ends before and behind them.

    part: returns the network with a layer alone, with its ends alone for None.
    """

    def __init__(self, part: Callable[[int | None], PreTrainedModel], layers: int) -> None:
        self.part = self._part = part
        self.layers = layers

    def base(self) -> PreTrainedModel:
        """Return the ends."""
        return self._part(None)

    def pieces(self) -> Iterator[PreTrainedModel]:
        """Yield a part for each layer, then the ends."""
        for index in range(self.layers):
            part = self._part(index)
            yield part
            drop(part)
        yield self._part(None)

    def parts(
        self, batches: Sequence[torch.Tensor], use_cache: bool | None = None
    ) -> Iterator[PreTrainedModel]:
        """Yield a part for each layer, then the ends."""
        states = self._embedded(batches, use_cache)
        for index in tqdm(range(self.layers), desc="layers", leave=False):
            model = self._part(index)
            passing = _Passing(states)
            with temporary_hooks() as hooks:
                (layer,) = layers_of(model)
                hooks.append(layer.register_forward_pre_hook(passing.enter))
                hooks.append(layer.register_forward_hook(passing.leave))
                yield model
                passing.run(model, batches, use_cache)
            states = passing.left
            model.set_submodule(map_of(model).layers[index].path, Passage())
            drop(model)
            del layer
        model = self._part(None)
        first = model.get_submodule(map_of(model).layers[0].path)
        first.register_forward_pre_hook(_Passing(states).enter)  # as long as there is this part
        yield model

    @torch.no_grad()
    def _embedded(
        self, batches: Sequence[torch.Tensor], use_cache: bool | None
    ) -> list[torch.Tensor]:
        """Return what the first layer reads of batches: (windows, tokens, hidden) each."""
        model = self._part(None)
        passing = _Passing([])
        first = model.get_submodule(map_of(model).layers[0].path)
        with temporary_hooks() as hooks:
            hooks.append(first.register_forward_hook(passing.leave))
            passing.run(model, batches, use_cache)
        drop(model)
        return passing.left


def drop(model: PreTrainedModel) -> None:
    """Let go of a part that somebody may still name, and of what hangs on it and refers to it."""
    vars(model).clear()


class _Passing:
    """Hooks of a layer, by which it reads kept states and what it gives is kept.

    states: (windows, tokens, hidden) of the batches to come, in the host's memory, as `left` is.
    """

    def __init__(self, states: list[torch.Tensor]) -> None:
        self._states = states[::-1]
        states.clear()  # each is gone once it was read
        self.left: list[torch.Tensor] = []

    def enter(self, layer: nn.Module, args: tuple) -> tuple:
        """Give the layer the next states in place of what it is called with."""
        assert self._states, "a part is called once with each batch"
        return (self._states.pop().to(args[0].device), *args[1:])

    def leave(self, layer: nn.Module, args: tuple, output: Any) -> None:
        """Keep what the layer gives."""
        self.left.append(hidden_states(output).detach().cpu())

    @torch.no_grad()
    def run(
        self, model: PreTrainedModel, batches: Sequence[torch.Tensor], use_cache: bool | None
    ) -> None:
        """Call a part with the batches that it was not called with."""
        for ids in batches[len(self.left) :]:
            decoder_of(model)(input_ids=ids.to(model.device), use_cache=use_cache)
