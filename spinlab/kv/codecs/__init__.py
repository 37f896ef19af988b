"""The codecs of the KV cache by name, and how a run's settings choose among them.

A codec is one module here and one line in CODECS.
"""

from collections.abc import Iterator
from dataclasses import fields

from spinlab.config import CodecConfig, KVConfig
from spinlab.config.checks import choice
from spinlab.config.kv import KEPT, Kept
from spinlab.config.unread import Rule
from spinlab.errors import InputError
from spinlab.kv.base import RowCodec
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.codecs.float_groups import FLOATS, FloatGroupCodec
from spinlab.kv.codecs.kivi import KIVICodec
from spinlab.kv.codecs.lloyd_max import LloydMaxCodec
from spinlab.kv.codecs.qjl import QJLCodec
from spinlab.seeds import stream

CODECS: dict[str, type[RowCodec]] = {
    "affine": AffineCodec,
    **dict.fromkeys(FLOATS, FloatGroupCodec),
    "kivi": KIVICodec,
    "lloyd_max": LloydMaxCodec,
    "qjl": QJLCodec,
}


def make_codec(
    name: str, settings: CodecConfig, width: int, seed: int, place: str = ""
) -> RowCodec | None:
    """Return what a side of the cache is coded with; None with 16 bits, which are not coded.

    name: of the side's settings, as `kv.keys`; each has a random stream of its own. place: what
    errors call these, where an override gives them. width: of one head. Raises InputError for an
    unknown codec and for what it does not take.
    """
    if not settings.quantizes:
        return None
    _check_name(place or name, settings)
    return CODECS[settings.codec].make(place or name, settings, width, stream(seed, name))


def unread_by_codecs(config: KVConfig) -> Iterator[Rule]:
    """Yield, as `spinlab.config.unread` does, which settings of a side its codec does not read.

    Raises InputError for an unknown codec, and for an override that gives what its codec does not
    read.
    """
    for side, settings in config.sides.items():
        name, placed = f"kv.{side}", [found for found in config.codecs(side) if found[1].quantizes]
        for place, codec in placed:
            _check_name(place, codec)
        if side in KEPT:
            _check_overrides(config, side)
        if not placed:
            continue
        codecs = [codec for _, codec in placed]
        reads = {"codec", "bits"}.union(*(CODECS[codec.codec].reads for codec in codecs))
        others = [f.name for f in fields(settings) if f.name not in reads]
        chosen = ",".join(dict.fromkeys(codec.codec for codec in codecs))
        yield f"{name}.codec={chosen}", [f"{name}.{other}" for other in others]


def _check_overrides(config: KVConfig, side: Kept) -> None:
    for entry, (place, codec) in zip(config.overrides, config.codecs(side)[1:], strict=True):
        reads = {"codec", "bits", *(CODECS[codec.codec].reads if codec.quantizes else ())}
        if lost := [name for name in getattr(entry, side).given if name not in reads]:
            chosen = f"codec {codec.codec}" if codec.quantizes else "16 bits"
            raise InputError(f"{place}.{lost[0]} is not read with {chosen}: leave it out")


def _check_name(name: str, settings: CodecConfig) -> None:
    choice(f"{name}.codec", settings.codec, tuple(CODECS))
