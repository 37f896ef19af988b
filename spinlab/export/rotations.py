"""A file of rotations, ours or SpinQuant's, that appears at once and whole."""

import logging
from collections.abc import Sequence
from pathlib import Path

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.parts import check_settings, source_of, tensors_in
from spinlab.export.targets import check_not_read, place_of, try_to_write
from spinlab.files import replacing, writing
from spinlab.rotation.exchange import is_rotations, write_bin
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)

_FORM = "an R.bin, unlike a .safetensors,"
_CANNOT = (
    "drawn_r3",
    "learned_r3",
    "drawn_r4",
    "latents",
    "inputs",
    "smoothing",
    "clips",
    "kv_clips",
    "weight_clips",
)  # of PARTS
_FUSED = ("r1", "r2")  # all that it holds: what settings make again is left out


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a file that holds something else, or could not hold the rotations."""
    if target.is_dir():
        raise InputError(f"{setting} is a folder: name a file in it")
    check_not_read(setting, target, "rotation.load", config.rotation.load)
    if target.exists() and target.stat().st_size and not is_rotations(target):
        raise InputError(f"{setting} is there and no file of rotations: name another")
    try_to_write(target.parent)
    if setting.endswith(".bin"):
        _check_bin(setting, config)


def write(subject: Subject, path: str) -> None:
    """Write all rotations, with the ranges that were learned along."""
    save_rotations(subject.rotations, path)


def save_rotations(rotations: RotationSet, path: str) -> None:
    """Write a .bin (R1 and R2) or a .safetensors (everything) in place of what is there.

    Raises InputError where an R.bin would lose a part.
    """
    target = place_of(path)
    with writing(target.parent, "export.rotations"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            write = write_bin if path.endswith(".bin") else RotationSet.save
            write(rotations, file)
    log.info("%-12s rotations in %s", "export", path)


def _check_bin(setting: str, config: Config) -> None:
    """Refuse what an R.bin has no place for, and rotations without those that it is made of."""
    check_settings(setting, _FORM, _CANNOT, config)
    source, rotation = source_of(config), config.rotation
    found = _FUSED if rotation.load else rotation.used
    if source is not None:
        found = tensors_in(source[1]) or _FUSED  # who reads it says what is wrong with it
    off = [name for name in _FUSED if name not in found]
    if off and source is not None:
        raise InputError(
            f"{setting}: an R.bin is R1 and R2, and {source[0]} does not bring "
            f"{' and '.join(map(str.upper, off))}: use .safetensors"
        )
    if off:
        raise InputError(
            f"{setting}: an R.bin is R1 and R2, which {_set(off, 'none')} leaves out: "
            f"set {_set(off, 'hadamard')} (or use .safetensors)"
        )


def _set(names: Sequence[str], kind: str) -> str:
    return " ".join(f"rotation.{name}={kind}" for name in names)
