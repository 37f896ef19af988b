"""The codecs of the KV cache by name, and how a run's settings choose among them.

A codec is one module here and one line in CODECS.
"""

from collections.abc import Iterator
from dataclasses import fields

from spinlab.config import CodecConfig, KVConfig
from spinlab.config.checks import choice
from spinlab.config.unread import Rule
from spinlab.kv.base import RowCodec
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.codecs.float_groups import FloatGroupCodec
from spinlab.kv.codecs.kivi import KIVICodec
from spinlab.kv.codecs.lloyd_max import LloydMaxCodec
from spinlab.kv.codecs.qjl import QJLCodec
from spinlab.seeds import stream

CODECS: dict[str, type[RowCodec]] = {
    "affine": AffineCodec,
    "mxfp4": FloatGroupCodec,
    "nvfp4": FloatGroupCodec,
    "kivi": KIVICodec,
    "lloyd_max": LloydMaxCodec,
    "qjl": QJLCodec,
}


def make_codec(name: str, settings: CodecConfig, width: int, seed: int) -> RowCodec | None:
    """Return what a side of the cache is coded with; None with 16 bits, which are not coded.

    name: of the settings, as `kv.keys`; each has a random stream of its own. width: of one head.
    Raises InputError for an unknown codec and for what it does not take.
    """
    if not settings.quantizes:
        return None
    _check_name(name, settings)
    return CODECS[settings.codec].make(name, settings, width, stream(seed, name))


def unread_by_codecs(config: KVConfig) -> Iterator[Rule]:
    """Yield, as `spinlab.config.unread` does, which settings of a side its codec does not read."""
    for side, settings in config.sides.items():
        name, codecs = f"kv.{side}", [codec for codec in config.codecs(side) if codec.quantizes]
        if not codecs:
            continue
        for codec in codecs:
            _check_name(name, codec)
        reads = {"codec", "bits"}.union(*(CODECS[codec.codec].reads for codec in codecs))
        others = [f.name for f in fields(settings) if f.name not in reads]
        chosen = ",".join(dict.fromkeys(codec.codec for codec in codecs))
        yield f"{name}.codec={chosen}", [f"{name}.{other}" for other in others]


def _check_name(name: str, settings: CodecConfig) -> None:
    choice(f"{name}.codec", settings.codec, tuple(CODECS))
