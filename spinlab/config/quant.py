"""Settings of the quantizers of weights and activations, head and embedding."""

from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from spinlab.config.checks import at_least, bits, choice, count, positive, ratio
from spinlab.errors import InputError

METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class TensorQuant:
    """Describe one quantizer: bits (16 = off), symmetry, group size (0 = channel or token).

    format: a name of `spinlab.formats.FORMATS`.
    """

    format: str = "integer"
    bits: int = 4
    symmetric: bool = False
    group_size: int = 0
    clip_ratio: float = 1.0  # of the range that is kept; for weights on top of their clip search

    def check(self, name: str) -> None:
        """Raise InputError, naming the setting, for what is out of range."""
        bits(f"{name}.bits", self.bits)
        ratio(f"{name}.clip_ratio", self.clip_ratio)
        at_least(f"{name}.group_size", self.group_size, 0)

    @property
    def quantizes(self) -> bool:
        """Tell whether there is anything to quantize: 16 bits stand for floats."""
        return self.bits < 16


def _off() -> TensorQuant:
    return TensorQuant(bits=16, symmetric=True)


@dataclass(frozen=True)
class QuantConfig:
    """Set the formats of weights and activations. In the papers head and embedding stay 16-bit."""

    weights: TensorQuant = field(default_factory=lambda: TensorQuant(symmetric=True))
    activations: TensorQuant = field(default_factory=TensorQuant)
    o_proj_per_head: bool = True  # o_proj input: one scale per token and head (SpinQuant)
    # [{pattern: "*.down_proj", weights: {bits: 8}, activations: {bits: 8}}, ...]: what differs for
    # linears whose full name matches; later entries go before earlier ones
    overrides: list[dict[str, Any]] = field(default_factory=list)
    head: TensorQuant = field(default_factory=_off)  # weight only, rounded to nearest
    embedding: TensorQuant = field(default_factory=_off)  # per token of the vocabulary

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "head", "embedding"):
            getattr(self, name).check(f"quant.{name}")
        for entry in self.overrides:
            if len(entry) < 2 or not isinstance(entry.get("pattern"), str):
                raise InputError(
                    f"quant.overrides: {entry} must have a pattern, and weights or activations"
                )
            if unknown := entry.keys() - {"pattern", "weights", "activations"}:
                raise InputError(f"quant.overrides[{entry['pattern']}]: {min(unknown)} is unknown")
            for name in ("weights", "activations"):
                self._changed(name, entry).check(f"quant.overrides[{entry['pattern']}].{name}")

    def weights_at(self, name: str) -> TensorQuant:
        """Return the weight format of a linear, by its full name."""
        return self._at("weights", name)

    def activations_at(self, name: str) -> TensorQuant:
        """Return the input format of a linear, by its full name."""
        return self._at("activations", name)

    def _at(self, kind: str, name: str) -> TensorQuant:
        matching = [o for o in self.overrides if kind in o and fnmatchcase(name, o["pattern"])]
        return self._changed(kind, matching[-1]) if matching else getattr(self, kind)

    def _changed(self, kind: str, entry: dict[str, Any]) -> TensorQuant:
        """Return a format with the changes of one override."""
        where, changes = f"quant.overrides[{entry['pattern']}].{kind}", entry.get(kind, {})
        if not isinstance(changes, dict):
            raise InputError(f"{where}={changes} must be a set of changes, as {{bits: 8}}")
        base: TensorQuant = getattr(self, kind)
        known = {f.name: type(getattr(base, f.name)) for f in fields(base)}
        for name, value in changes.items():
            kinds = (float, int) if known.get(name) is float else (known.get(name),)
            if type(value) not in kinds:
                raise InputError(
                    f"{where}: {name}={value} does not fit: there are "
                    + ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
                )
        return replace(base, **changes)

    @property
    def weight_formats(self) -> list[TensorQuant]:
        """All weight formats that may occur in the decoder layers."""
        return [self.weights, *(self._changed("weights", o) for o in self.overrides)]

    @property
    def activation_formats(self) -> list[TensorQuant]:
        """All input formats that may occur in the decoder layers."""
        return [self.activations, *(self._changed("activations", o) for o in self.overrides)]

    @property
    def quantizes_weights(self) -> bool:
        """Tell whether any weight has fewer than 16 bits."""
        return any(t.quantizes for t in (*self.weight_formats, self.head, self.embedding))


@dataclass(frozen=True)
class WeightsConfig:
    """Choose how weights are rounded: RTN or GPTQ (Frantar et al. 2022), and the clip search."""

    method: str = "rtn"
    clip_search: bool = True
    clip_norm: float = 2.4
    clip_grid: int = 100
    clip_max_shrink: float = 0.8
    samples: int = 128  # GPTQ and LWC calibration windows
    sequence_length: int = 2048
    block_size: int = 128
    percdamp: float = 0.01
    act_order: bool = False
    static_groups: bool = False  # group ranges from the start, not as columns stand when reached
    lwc_epochs: int = 0  # RTN: learnable weight clipping, layer by layer, this many epochs
    lwc_lr: float = 5e-3

    @property
    def clip_settings(self) -> dict[str, Any]:
        """The settings that RTN depends on: those of its clip search."""
        return {k: v for k, v in vars(self).items() if k.startswith("clip_")}

    def __post_init__(self) -> None:
        choice("weights.method", self.method, METHODS)
        for name in ("clip_norm", "percdamp", "lwc_lr"):
            positive(f"weights.{name}", getattr(self, name))
        for name in ("clip_grid", "samples", "block_size"):
            count(f"weights.{name}", getattr(self, name))
        at_least("weights.sequence_length", self.sequence_length, 2)
        count("weights.lwc_epochs", self.lwc_epochs, 0)
        at_least("weights.clip_grid*clip_max_shrink", self.clip_grid * self.clip_max_shrink, 1)
        if not 0 < self.clip_max_shrink < 1:
            raise InputError(f"weights.clip_max_shrink={self.clip_max_shrink} must lie in (0, 1)")
        if self.lwc_epochs and self.method != "rtn":
            raise InputError("weights.lwc_epochs learns the ranges of RTN: use weights=rtn")
