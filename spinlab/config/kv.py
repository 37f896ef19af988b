"""Settings of the KV cache: what keys, values and queries go through, one type for the three."""

from dataclasses import dataclass, field, fields

from spinlab.config.checks import at_least, count, ratio


@dataclass(frozen=True)
class CodecConfig:
    """Choose a codec by its name in `spinlab.kv.codecs`, and how finely it codes (16 bits = off).

    The codec says which bits it takes, what else it reads, and which groups divide a head.
    """

    codec: str = "affine"
    bits: int = 4
    symmetric: bool = False
    group_size: int = 0  # 0 = one group per token and head
    clip_ratio: float = 1.0  # of the range that is kept

    def check(self, name: str) -> None:
        """Raise InputError, naming the setting, for what is out of range."""
        count(f"{name}.bits", self.bits, 1, 16)
        ratio(f"{name}.clip_ratio", self.clip_ratio)
        at_least(f"{name}.group_size", self.group_size, 0)

    @property
    def quantizes(self) -> bool:
        """Tell whether there is anything to code: 16 bits stand for floats."""
        return self.bits < 16


@dataclass(frozen=True)
class KVConfig:
    """Set what is cached, and the queries as they meet it, which DuQuant quantizes too."""

    keys: CodecConfig = field(default_factory=CodecConfig)
    values: CodecConfig = field(default_factory=CodecConfig)
    queries: CodecConfig = field(default_factory=lambda: CodecConfig(bits=16))

    def __post_init__(self) -> None:
        for side, settings in self.sides.items():
            settings.check(f"kv.{side}")

    @property
    def sides(self) -> dict[str, CodecConfig]:
        """The settings of keys, values and queries by these names."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
