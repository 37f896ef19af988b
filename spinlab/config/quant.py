"""Settings of the quantizers of weights and activations, head and embedding."""

from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from spinlab.config.checks import at_least, bits, ratio
from spinlab.errors import InputError


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
