"""Settings of the quantizers of weights and activations, head and embedding."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

from spinlab.config.changes import Change
from spinlab.config.checks import at_least, bits, ratio
from spinlab.config.data import WindowsConfig
from spinlab.errors import InputError

Kind = Literal["weights", "activations"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CALIBRATED = "nvfp4_calibrated"  # of inputs alone: one scale of the tensor, from calibration


@dataclass(frozen=True)
class Levels:
    """Say how finely numbers are told apart, and in which groups."""

    fewest: ClassVar[int] = 2
    bits: int = 4  # 16 = off
    symmetric: bool = False
    group_size: int = 0  # 0 = one group per channel of a weight, per token, or per token and head
    clip_ratio: float = 1.0  # of the range that is kept; for weights on top of their clip search

    def check(self, name: str) -> None:
        """Raise InputError, naming the setting, for what is out of range."""
        bits(f"{name}.bits", self.bits, self.fewest)
        ratio(f"{name}.clip_ratio", self.clip_ratio)
        at_least(f"{name}.group_size", self.group_size, 0)

    @property
    def quantizes(self) -> bool:
        """Tell whether there is anything to quantize: 16 bits stand for floats."""
        return self.bits < 16


@dataclass(frozen=True)
class TensorQuant(Levels):
    """Describe the quantizer of a tensor. format: a name of `spinlab.formats.FORMATS`."""

    format: str = "integer"


@dataclass(frozen=True)
class PeaksConfig(WindowsConfig):
    """Set the calibration windows whose largest inputs the scales of tensors are made of."""

    place: ClassVar[str] = "quant.calibration"


@dataclass
class FormatChange(Change):
    """Give what differs from a format; what is left out stays as it is."""

    format: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    clip_ratio: float | None = None


@dataclass  # not frozen, as what it holds
class Override:
    """Change the formats of linears whose full name matches a pattern, as *.layers.0.*"""

    pattern: str
    weights: FormatChange = field(default_factory=FormatChange)
    activations: FormatChange = field(default_factory=FormatChange)

    def __post_init__(self) -> None:
        if not self.weights.given and not self.activations.given:
            raise InputError(
                f"quant.overrides[{self.pattern}] changes nothing: it must have weights or "
                "activations, as {bits: 8}"
            )


def _off() -> TensorQuant:
    return TensorQuant(bits=16, symmetric=True)


@dataclass(frozen=True)
class QuantConfig:
    """Set the formats of weights and activations. In the papers head and embedding stay 16-bit."""

    weights: TensorQuant = field(default_factory=lambda: TensorQuant(symmetric=True))
    activations: TensorQuant = field(default_factory=TensorQuant)
    o_proj_per_head: bool = True  # o_proj input: one scale per token and head (SpinQuant)
    # [{pattern: "*.down_proj", weights: {bits: 8}, activations: {bits: 8}}, ...]; the last one that
    # matches counts
    overrides: list[Override] = field(default_factory=list)
    head: TensorQuant = field(default_factory=_off)  # weight only, rounded to nearest
    embedding: TensorQuant = field(default_factory=_off)  # per token of the vocabulary
    # both in one: the matrix that the original ties, rounded before it is rotated, stored once
    tied: TensorQuant = field(default_factory=_off)
    calibration: PeaksConfig = field(default_factory=PeaksConfig)

    def __post_init__(self) -> None:
        self._check_calibrated()
        for name in ("weights", "activations", "head", "embedding", "tied"):
            getattr(self, name).check(f"quant.{name}")
        for entry in self.overrides:
            for kind in KINDS:
                self._changed(kind, entry).check(f"quant.overrides[{entry.pattern}].{kind}")
        if self.tied.quantizes and (self.head.quantizes or self.embedding.quantizes):
            raise InputError(
                f"quant.tied.bits={self.tied.bits} is the format of head and embedding: leave "
                "quant.head.bits=16 and quant.embedding.bits=16"
            )

    def _check_calibrated(self) -> None:
        """Refuse a format for what comes in where the numbers are known before."""
        formats = {name: [getattr(self, name)] for name in ("head", "embedding", "tied")}
        for name, found in {"weights": self.formats("weights"), **formats}.items():
            if any(format.quantizes and format.format == CALIBRATED for format in found):
                raise InputError(
                    f"quant.{name}.format={CALIBRATED} is a format of inputs, whose range is found "
                    "by calibration: use nvfp4"
                )

    @property
    def calibrates(self) -> bool:
        """Tell whether any input has its range from calibration."""
        inputs = self.formats("activations")
        return any(format.quantizes and format.format == CALIBRATED for format in inputs)

    def format_at(self, kind: Kind, name: str) -> TensorQuant:
        """Return the format of a linear's weight or input, by the linear's full name."""
        place = self.override_at(kind, name)
        return getattr(self, kind) if place is None else self._changed(kind, self.overrides[place])

    def place_of(self, kind: Kind, name: str) -> str:
        """Return what a user calls the format of a linear's weight or input."""
        place = self.override_at(kind, name)
        of_override = "" if place is None else f"overrides[{self.overrides[place].pattern}]."
        return f"quant.{of_override}{kind}"

    def override_at(self, kind: Kind, name: str) -> int | None:
        """Return the place of the override that gives a linear its format; None without one."""
        for place, entry in reversed(list(enumerate(self.overrides))):
            if getattr(entry, kind).given and fnmatchcase(name, entry.pattern):
                return place
        return None

    def formats(self, kind: Kind) -> list[TensorQuant]:
        """Return all formats of weights or inputs that may occur in the decoder layers."""
        return [getattr(self, kind), *(self._changed(kind, entry) for entry in self.overrides)]

    def quantizes(self, kind: Kind) -> bool:
        """Tell whether any weight or input in the decoder layers has fewer than 16 bits."""
        return any(format.quantizes for format in self.formats(kind))

    def _changed(self, kind: Kind, entry: Override) -> TensorQuant:
        return getattr(entry, kind).applied(getattr(self, kind))

    @property
    def rounds_weights(self) -> bool:
        """Tell whether any weight has fewer than 16 bits, head and embedding among them."""
        ends = (self.head, self.embedding, self.tied)
        return self.quantizes("weights") or any(format.quantizes for format in ends)
