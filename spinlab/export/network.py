"""What `export.artefact` is made of, beside a config, a tokenizer and a generation config.

weights.safetensors    packed levels, scales and zero points of what was rounded, as
                       `spinlab.weights.quantized.save_weights` writes them
rest.safetensors       every other number of the rotated network, in the dtype that it ran in
rotations.safetensors  what runs online, and learned ranges of inputs, keys and values; R1, R2 and
                       learned ranges of weights are in the weights

Of a tied matrix (`quant.tied`) there is one set of levels, that of the original. What embedding and
head hold is made of it, by R1 and the gain of the final norm, which are there for that.
manifest.json          `Network`, the record of the run, and the digest of every file
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig, plain
from spinlab.config.checks import choice
from spinlab.config.schema import stored
from spinlab.errors import InputError
from spinlab.model.modules import map_of

WEIGHTS, REST, ROTATIONS = (f"{name}.safetensors" for name in ("weights", "rest", "rotations"))
DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Network:
    """Say how a network computes. dtype: of its floats; seed: of what codecs of the cache draw."""

    dtype: str
    seed: int
    quant: QuantConfig = field(default_factory=QuantConfig)
    kv: KVConfig = field(default_factory=KVConfig)

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, DTYPES)

    def rest(self, model: PreTrainedModel, weights: Collection[str]) -> list[str]:
        """Return the names of a rotated model's tensors that are in no packed weight.

        Of a part of the model they are those of the part.
        """
        paths = {*weights, map_of(model).head} if self.quant.tied.quantizes else set(weights)
        names = [name for name in model.state_dict() if name.removesuffix(".weight") not in paths]
        if map_of(model).has_ends:
            return names
        layers = tuple(f"{layer.path}." for layer in map_of(model).there.values())
        return [name for name in names if name.startswith(layers)]

    def as_json(self) -> dict[str, Any]:
        return plain(self)


def network_from(place: str, found: Any) -> Network:
    """Return what `Network.as_json` gave. Raises InputError for anything else.

    place: how sentences call the artefact.
    """
    try:
        names = {f.name for f in fields(Network)}
        if not isinstance(found, Mapping) or found.keys() != names:
            raise InputError(f"it must have {', '.join(sorted(names))}")
        kv = found["kv"]
        if isinstance(kv, Mapping):  # of a version that coded every bias, and did not say so
            found = {**found, "kv": {"key_bias": "coded", **kv}}
        return stored(Network, found)
    except InputError as error:
        raise InputError(f"{place}: the network in its manifest cannot be read: {error}") from error
