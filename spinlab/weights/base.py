"""What a method that rounds weights is given."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.config import QuantConfig, WeightsConfig
from spinlab.kv.bias import KeyBiases, take_key_biases
from spinlab.kv.path import KVPath
from spinlab.model.modules import map_of, set_map
from spinlab.model.network import drop
from spinlab.model.parts import Passage
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.quantized import PackedWeights, QuantizedWeight

Step = Callable[[PreTrainedModel], object]
Weights = MutableMapping[str, QuantizedWeight]  # by the path of their linear


@dataclass(frozen=True)
class Rounding:
    """Name a fused model whose weights are to be rounded, and how.

    Weights of the model may be overwritten. rotations: what it was fused with, of which some stay
    online. windows: (samples, length) token ids, where the method's settings ask for them, else
    None. What is left in the folder `progress` is there when a killed run continues. kv: what keys,
    values and queries will go through. part: where the model has no more than its ends, returns it
    with a layer alone, fused.
    """

    model: PreTrainedModel
    rotations: RotationSet
    windows: torch.Tensor | None
    quant: QuantConfig
    config: WeightsConfig
    progress: Path
    kv: KVPath = field(default_factory=KVPath)
    part: Callable[[int], PreTrainedModel] | None = None
    _steps: list[Step] = field(init=False, default_factory=list)

    def change(self, step: Step) -> None:
        """Change the model, in place; layers that are not there are changed once they are."""
        step(self.model)
        self._steps.append(step)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Have a layer in the model for a while, if it is not there anyway."""
        if self.part is None:
            yield
            return
        model, ends = self.model, map_of(self.model)
        part, path = self.part(index), ends.layers[index].path
        for step in self._steps:
            step(part)
        model.set_submodule(path, part.get_submodule(path))
        set_map(model, map_of(part))
        try:
            yield
        finally:
            model.set_submodule(path, Passage())
            set_map(model, ends)

    def pieces(self) -> Iterator[PreTrainedModel]:
        """Yield the model, then every layer that is not there, in a model of its own."""
        yield self.model
        if self.part is not None:
            for index in tqdm(range(len(map_of(self.model).layers)), desc=self.config.method):
                part = self.part(index)
                yield part
                drop(part)

    def biases_apart(self) -> KeyBiases:
        """Return the biases of keys that are kept apart, of all layers where those come one by one.

        A model that is there as a whole has them in its own path of keys.
        """
        model_map = map_of(self.model)
        if self.part is None or not (self.kv.apart and model_map.key_biases):
            return ()
        found = (take_key_biases(self.part(n), self.kv.r3)[n] for n in range(len(model_map.layers)))
        return tuple(found)

    def store(self) -> Weights:
        """Return an empty place for weights, packed where the model is not there as a whole."""
        return {} if self.part is None else PackedWeights()
