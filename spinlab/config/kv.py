"""Settings of the KV cache: what keys, values and queries go through, one type for the three."""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

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


# these two are not frozen: OmegaConf merges nothing into what is, where it stands in a list
@dataclass
class CodecChange:
    """Give what differs from a codec; what is left out stays as it is."""

    codec: str | None = None
    bits: int | None = None
    symmetric: bool | None = None
    group_size: int | None = None
    clip_ratio: float | None = None
    run: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is not left out, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
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
        for side, settings in self.sides.items():
            settings.check(f"kv.{side}")
        for entry in self.overrides:
            for side in KEPT:
                self._changed(side, entry).check(f"kv.overrides[{entry.pattern}].{side}")
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

    def codec_at(self, side: Kept, layer: int, names: list[str]) -> CodecConfig:
        """Return what a side of a layer is coded with; names: of all layers' attentions."""
        if layer < self.first_layers or layer >= len(names) - self.last_layers:
            return replace(getattr(self, side), bits=16)
        for entry in reversed(self.overrides):
            if getattr(entry, side).given and fnmatchcase(names[layer], entry.pattern):
                return self._changed(side, entry)
        return getattr(self, side)

    def codecs(self, side: str) -> list[CodecConfig]:
        """Return all settings of a side that may occur."""
        changed = (self._changed(side, entry) for entry in self.overrides if side in KEPT)
        return [self.sides[side], *changed]

    @property
    def draws(self) -> bool:
        """Tell whether any codec has a rotation or a sketch that the run's seed draws."""
        return any(codec.codec in _DRAWN for side in self.sides for codec in self.codecs(side))

    def codes(self, *sides: str) -> bool:
        """Tell whether any of these sides has fewer than 16 bits anywhere."""
        return any(codec.quantizes for side in sides for codec in self.codecs(side))

    def has_no_ranges(self) -> str:
        """Say why keys and values have no clip ratio to be learned; empty where they have."""
        if not self.codes(*KEPT):
            return "they have 16 bits"
        kinds = {(s, c.codec) for s in KEPT for c in self.codecs(s) if c.quantizes}
        others = (f"kv.{side}.codec={codec}" for side, codec in kinds if codec != "affine")
        return next((f"{setting} has none" for setting in others), "")

    def _changed(self, side: str, entry: KVOverride) -> CodecConfig:
        return replace(self.sides[side], **getattr(entry, side).given)
