"""The networks that an experiment compares, each known by the artefacts that it is made of.

fp       the original
rtn      no rotation, weights rounded to nearest, on integer kernels
init     the initial rotation, weights by the experiment's method, on integer kernels
fake     the learned rotation, quantization emulated in floating point
integer  the same weights as `fake`, on integer kernels
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spinlab.cache import Artifact
from spinlab.config import plain
from spinlab.model.network import Load, Network, as_it_is
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.rotations import AS_IT_IS, RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import rotations_in
from spinlab.stages.run import Run
from spinlab.stages.weights import weights_of
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Variant:
    """Name a network and its parts. rotated: None without rotations; weights: None in 16 bits."""

    name: str
    rotated: Artifact | None
    weights: Artifact | None

    @property
    def is_original(self) -> bool:
        return self.name == "fp"

    @property
    def is_emulated(self) -> bool:
        return self.name == "fake"

    def depends(self, run: Run, original: Original) -> list[Any]:
        """Name everything that the network depends on."""
        depends: list[Any] = [original.identity]
        if self.is_original:
            return depends
        depends += [made and made.key for made in (self.weights, self.rotated)]
        depends += [plain(run.config.quant), original.kv_settings]
        return depends if self.is_emulated else [*depends, run.backend]

    def network(
        self, run: Run, original: Original
    ) -> tuple[Network, Mapping[str, QuantizedWeight] | None]:
        """Return the network, whole or in parts as settings have it, and its quantized weights.

        The original has none.
        """
        if self.is_original:
            return original.network(as_it_is), None
        parts, config = self.parts(run), run.config

        def make(load: Load) -> PreTrainedModel:
            networks = QuantizedNetworks(load, config.quant, config.kv, config.seed)
            return self.on_integers(networks, run.backend, *parts)

        return original.network(make), parts[1]

    def parts(self, run: Run) -> tuple[RotationSet, Mapping[str, QuantizedWeight]]:
        """Load rotations and weights."""
        rotations = AS_IT_IS if self.rotated is None else rotations_in(run, self.rotated)
        return rotations, {} if self.weights is None else weights_of(run, self.weights)

    def on_integers(
        self,
        networks: QuantizedNetworks,
        backend: str,
        rotations: RotationSet,
        weights: Mapping[str, QuantizedWeight],
    ) -> PreTrainedModel:
        """Assemble the network that multiplies integers, on kernels or emulated."""
        if self.is_emulated:
            return networks.emulated(rotations, weights)
        return networks.integer(rotations, weights, backend)
