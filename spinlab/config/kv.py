"""Settings of the KV cache: what keys, values and queries go through, one type for the three."""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

from spinlab.config.changes import Change
from spinlab.config.checks import at_least, choice, count
from spinlab.config.quant import Levels
from spinlab.errors import InputError

KEY_BIAS = ("apart", "coded")
LENGTHS = ("plain", "norm", "least_squares", "eden")
TURNS = ("random", "hadamard", "none")
Kept = Literal["keys", "values"]
KEPT: tuple[Kept, ...] = get_args(Kept)


@dataclass(frozen=True)
class LloydMaxConfig:
    """Set how Lloyd-Max levels of a rotated head's numbers are found and scaled.

    With `residual` (TurboQuant's product form) one of the bits is the sign of a sketch of what the
    levels leave.
    """

    turn: str = "random"  # before the levels; none where R2 and R3 have turned the head
    # what levels c are scaled by, y being the rotated head: |y|, |y|/|c|, <c,y>/|c|², |y|²/<c,y>
    length: str = "plain"
    residual: bool = False


@dataclass(frozen=True)
class QJLConfig:
    """Set how signs of a Gaussian sketch are taken: `bits` of them for every number of a head."""

    orthogonal: bool = True  # rows of the sketch, as many at a time as a head is wide
    outliers: int = 0  # channels of a run of tokens that have a sketch and a norm of their own
    outlier_bits: int = 1  # of that sketch, for every number of a head


@dataclass(frozen=True)
class CodecConfig(Levels):
    """Choose a codec by its name in `spinlab.kv.codecs`, and how finely it codes.

    The codec says which bits it takes, what else it reads, and which groups divide a head.
    """

    fewest: ClassVar[int] = 1
    codec: str = "affine"
    run: int = 32  # tokens that are coded together, where a codec does that
    lloyd_max: LloydMaxConfig = field(default_factory=LloydMaxConfig)
    qjl: QJLConfig = field(default_factory=QJLConfig)

    def check(self, name: str) -> None:
        super().check(name)
        count(f"{name}.run", self.run)
        choice(f"{name}.lloyd_max.turn", self.lloyd_max.turn, TURNS)
        choice(f"{name}.lloyd_max.length", self.lloyd_max.length, LENGTHS)
        at_least(f"{name}.qjl.outliers", self.qjl.outliers, 0)
        count(f"{name}.qjl.outlier_bits", self.qjl.outlier_bits, most=16)


@dataclass
class LloydMaxChange(Change):
    """Give what differs of Lloyd-Max levels."""

    turn: str | None = None
    length: str | None = None
    residual: bool | None = None


@dataclass
class QJLChange(Change):
    """Give what differs of a sketch's signs."""

    orthogonal: bool | None = None
    outliers: int | None = None
    outlier_bits: int | None = None


@dataclass
class CodecChange(Change):
    """Give what differs from a codec; what is left out stays as it is."""

    codec: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    clip_ratio: float | None = None
    run: int | None = None
    lloyd_max: LloydMaxChange = field(default_factory=LloydMaxChange)
    qjl: QJLChange = field(default_factory=QJLChange)


@dataclass  # not frozen, as what it holds
class KVOverride:
    """Change the codecs of layers whose attention's full name matches a pattern, *.layers.0.*"""

    pattern: str
    keys: CodecChange = field(default_factory=CodecChange)
    values: CodecChange = field(default_factory=CodecChange)

    def __post_init__(self) -> None:
        if not self.keys.given and not self.values.given:
            raise InputError(
                f"kv.overrides[{self.pattern}] changes nothing: it must have keys or values, as "
                "{bits: 8}"
            )


Placed = tuple[str, CodecConfig]  # settings, and what a user calls them
_DRAWN = ("lloyd_max", "qjl")  # codecs with tensors of their own


@dataclass(frozen=True)
class KVConfig:
    """Set what is cached, and the queries as they meet it, which DuQuant quantizes too."""

    keys: CodecConfig = field(default_factory=CodecConfig)
    values: CodecConfig = field(default_factory=CodecConfig)
    queries: CodecConfig = field(default_factory=lambda: CodecConfig(bits=16))
    # what the linear of the keys adds to all of them (Qwen2): apart, or coded with each key
    key_bias: str = "apart"
    # [{pattern: "*.layers.0.*", keys: {bits: 8}, values: {bits: 8}}, ...]; the last one that
    # matches counts
    overrides: list[KVOverride] = field(default_factory=list)
    # not coded, and kept in 16 bits: of all layers so many, and of every sequence so many tokens
    first_layers: int = 0
    last_layers: int = 0
    sinks: int = 0  # the first tokens
    window: int = 0  # the newest tokens, as seen by each token

    def __post_init__(self) -> None:
        for side in self.sides:
            for place, settings in self.codecs(side):
                settings.check(place)
        choice("kv.key_bias", self.key_bias, KEY_BIAS)
        for name in ("first_layers", "last_layers", "sinks", "window"):
            at_least(f"kv.{name}", getattr(self, name), 0)

    @property
    def sides(self) -> dict[str, CodecConfig]:
        """The settings of keys, values and queries by these names."""
        return {"keys": self.keys, "values": self.values, "queries": self.queries}

    @property
    def varies(self) -> bool:
        """Tell whether layers may differ."""
        return bool(self.overrides or self.first_layers or self.last_layers)

    def codec_at(self, side: Kept, layer: int, names: list[str]) -> Placed:
        """Return what a side of a layer is coded with; names: of all layers' attentions."""
        usual, *changed = self.codecs(side)
        if layer < self.first_layers or layer >= len(names) - self.last_layers:
            return usual[0], replace(usual[1], bits=16)
        for entry, found in zip(reversed(self.overrides), reversed(changed), strict=True):
            if getattr(entry, side).given and fnmatchcase(names[layer], entry.pattern):
                return found
        return usual

    def codecs(self, side: str) -> list[Placed]:
        """Return all settings of a side that may occur: its own, then those of every override."""
        own, entries = self.sides[side], self.overrides if side in KEPT else ()
        changed = (
            (f"kv.overrides[{entry.pattern}].{side}", getattr(entry, side).applied(own))
            for entry in entries
        )
        return [(f"kv.{side}", own), *changed]

    @property
    def draws(self) -> bool:
        """Tell whether any codec has a rotation or a sketch that the run's seed draws."""
        return any(codec.codec in _DRAWN for side in self.sides for _, codec in self.codecs(side))

    def codes(self, *sides: str) -> bool:
        """Tell whether any of these sides has fewer than 16 bits anywhere."""
        return any(codec.quantizes for side in sides for _, codec in self.codecs(side))

    def has_no_ranges(self) -> str:
        """Say why keys and values have no clip ratio to be learned; empty where they have."""
        if not self.codes(*KEPT):
            return "they have 16 bits"
        found = (placed for side in KEPT for placed in self.codecs(side) if placed[1].quantizes)
        others = (f"{place}.codec={c.codec} has none" for place, c in found if c.codec != "affine")
        return next(others, "")
