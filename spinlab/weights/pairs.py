"""The calibration windows on their way through two networks: the quantized and its original."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.kv.cache import set_kv_path
from spinlab.kv.path import KVPath
from spinlab.model.families.experts import Router
from spinlab.model.hooks import temporary_hooks
from spinlab.weights.calibration import LayerInputs


@contextmanager
def unquantized_inputs(layer: nn.Module) -> Iterator[None]:
    """Leave the inputs of a layer's linears as they are."""
    paths = {linear.path for linear in _linears(layer)}
    quantizers = {path: path.quantizer for path in paths}
    for path in paths:
        path.quantizer = None
    try:
        yield
    finally:
        for path, quantizer in quantizers.items():
            path.quantizer = quantizer


@contextmanager
def routed_alike(layer: nn.Module) -> Iterator[None]:
    """Let the routers of a layer choose at every pass as they do at the first."""
    chosen: dict[nn.Module, Any] = {}

    def keep(router: nn.Module, args: tuple, output: Any) -> Any:
        return chosen.setdefault(router, output)

    with temporary_hooks() as hooks:
        routers = [module for module in layer.modules() if isinstance(module, Router)]
        hooks += [router.register_forward_hook(keep) for router in routers]
        yield


class PairedInputs:
    """Hold what the current decoder layer reads in two networks that are one model.

    original: where nothing is rounded; what runs online, R3 too, runs there as well. quantized:
    with weights as they are by now, and with linears' inputs, keys, values and queries rounded by
    `coded` and the linears' paths; `exact` is the original's path. The model is the quantized
    network between calls. It holds one layer's weights twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: LayerInputs,
        quantized: LayerInputs,
        exact: KVPath,
        coded: KVPath,
    ) -> None:
        self.original, self.quantized = original, quantized
        self._model, self._kv = model, (exact, coded)
        self.begin()

    @property
    def index(self) -> int:
        """The number of the current layer."""
        return self.quantized.index

    def begin(self) -> None:
        """Take the weights of the current layer, which came just now, as the original's."""
        self._exact = _weights(self.quantized.layer)

    def visit(
        self, linear: FakeQuantLinear, see: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Call `see` with both inputs of a linear of the current layer, batch after batch.

        They are what it multiplies: the original's, transformed, and the quantized network's,
        transformed and rounded. Both of an expert are of the tokens that it gets in the latter.
        """
        for batch in range(len(self.quantized.batches)):
            with routed_alike(self.quantized.layer):
                x = linear.path(self.quantized.shown(batch, linear))
                with self._as_original():
                    exact = linear.path(self.original.shown(batch, linear))
            see(exact, x)

    def advance(self) -> None:
        """Go through the current layer to the next, in both networks."""
        with self._as_original():
            self.original.advance()
        self.quantized.advance()
        if self.index < len(self.quantized.layers):
            self.begin()

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """Make the current layer the original's."""
        layer = self.quantized.layer
        rounded = _weights(layer)
        _set_weights(self._exact)
        exact, coded = self._kv
        set_kv_path(self._model, exact)
        try:
            with unquantized_inputs(layer):
                yield
        finally:
            set_kv_path(self._model, coded)
            _set_weights(rounded)


def _linears(layer: nn.Module) -> list[FakeQuantLinear]:
    return [module for module in layer.modules() if isinstance(module, FakeQuantLinear)]


def _weights(layer: nn.Module) -> dict[FakeQuantLinear, torch.Tensor]:
    return {linear: linear.weight for linear in _linears(layer)}


def _set_weights(weights: Mapping[FakeQuantLinear, torch.Tensor]) -> None:
    for linear, weight in weights.items():
        linear.weight = weight
