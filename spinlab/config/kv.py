"""Settings of the KV cache: what keys, values and queries go through, one type for the three."""

from dataclasses import dataclass, field
from typing import ClassVar

from spinlab.config.checks import choice
from spinlab.config.quant import Levels

KEY_BIAS = ("apart", "coded")


@dataclass(frozen=True)
class CodecConfig(Levels):
    """Choose a codec by its name in `spinlab.kv.codecs`, and how finely it codes.

    The codec says which bits it takes, what else it reads, and which groups divide a head.
    """

    fewest: ClassVar[int] = 1
    codec: str = "affine"


@dataclass(frozen=True)
class KVConfig:
    """Set what is cached, and the queries as they meet it, which DuQuant quantizes too."""

    keys: CodecConfig = field(default_factory=CodecConfig)
    values: CodecConfig = field(default_factory=CodecConfig)
    queries: CodecConfig = field(default_factory=lambda: CodecConfig(bits=16))
    # what the linear of the keys adds to all of them (Qwen2): apart, or coded with each key
    key_bias: str = "apart"

    def __post_init__(self) -> None:
        for side, settings in self.sides.items():
            settings.check(f"kv.{side}")
        choice("kv.key_bias", self.key_bias, KEY_BIAS)

    @property
    def sides(self) -> dict[str, CodecConfig]:
        """The settings of keys, values and queries by these names."""
        return {"keys": self.keys, "values": self.values, "queries": self.queries}
