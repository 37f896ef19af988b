"""A file of rotations, ours or SpinQuant's, that appears at once and whole."""

import logging
from operator import attrgetter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.targets import check_not_read, place_of, try_to_write
from spinlab.files import replacing, writing
from spinlab.rotation.exchange import is_rotations, write_bin
from spinlab.rotation.rotations import ONLINE, RotationSet

log = logging.getLogger(__name__)

_HADAMARD = ("none", "identity", "hadamard", "exact_hadamard")  # kinds that a setting makes again


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
    """Refuse what an R.bin has no place for, as far as settings and a loaded file tell."""
    learn, rotation = config.learn, config.rotation
    lost = {
        "learn.lr.clip": learn.steps and learn.lr.clip,
        "learn.lr.input_clip": learn.steps and learn.lr.input_clip,
        "rotation.inputs": rotation.inputs != "none",
        "rotation.smooth": rotation.smooth is not None,
        "rotation.load": learn.steps == 0 and _carries_more(rotation.load),
    }
    if rotation.load is None:
        lost |= {f"rotation.{name}": getattr(rotation, name) == "none" for name in ("r1", "r2")}
    if rotation.online and not (rotation.load or "").endswith(".safetensors"):
        online = (name for name in ONLINE if getattr(rotation, name) not in _HADAMARD)
        lost |= {f"rotation.{name}": True for name in online}
    for name, there in lost.items():
        if there:
            raise InputError(
                f"{setting}: an R.bin holds R1 and R2 and nothing else, which does not go with "
                f"{name}={attrgetter(name)(config)}: use .safetensors"
            )


def _carries_more(path: str | None) -> bool:
    """Tell whether a file of rotations has transforms of inputs or learned ranges."""
    if not path or path.endswith(".bin"):
        return False
    try:
        with safe_open(place_of(path), framework="pt") as file:
            return any(n.startswith(("inputs.", "clip.", "weight_clip.")) for n in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # who reads it says what is wrong with it
