"""Where exports go: checked before any work, written by one process at a time, never half."""

import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import psutil
from safetensors import SafetensorError, safe_open

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.model.files import MANIFEST
from spinlab.rotation.exchange import is_rotations
from spinlab.rotation.rotations import ONLINE

log = logging.getLogger(__name__)

_HADAMARD = ("none", "identity", "hadamard", "exact_hadamard")  # kinds that a setting makes again


def check_export(config: Config) -> None:
    """Raise InputError, before any work is done, for an export that could not be written."""
    for name, check in (("rotations", _check_file), ("transformed", _check_checkpoint)):
        path = getattr(config.export, name)
        setting = f"export.{name}={path}"
        try:
            if path:
                check(setting, place_of(path), config)
        except OSError as error:
            raise InputError(f"{setting} cannot be written: {error.strerror}") from error


def _check_file(setting: str, target: Path, config: Config) -> None:
    if target.is_dir():
        raise InputError(f"{setting} is a folder: name a file in it")
    _check_not_read(setting, target, "rotation.load", config.rotation.load)
    if target.exists() and target.stat().st_size and not is_rotations(target):
        raise InputError(f"{setting} is there and no file of rotations: name another")
    folder = config.export.transformed
    if folder and target.is_relative_to(place_of(folder)):
        raise InputError(f"{setting} lies in export.transformed={folder}: name another place")
    _try(target.parent)
    if setting.endswith(".bin"):
        _check_bin(setting, config)


def _check_checkpoint(setting: str, target: Path, config: Config) -> None:
    _check_not_read(setting, target, "model.path", config.model.path)
    check_replaceable(setting, target)
    _try(target)
    _try(target.parent)  # where it is made before it gets its name


def place_of(path: str) -> Path:
    """Return the place that a setting names, behind `~` and links."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def check_replaceable(setting: str, folder: Path) -> None:
    """Raise InputError for a folder that holds something, and no earlier export."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(f"{setting} is there and no earlier export: name another folder")


def _check_not_read(setting: str, target: Path, source: str, path: str | None) -> None:
    if path and place_of(path) == target:
        raise InputError(f"{setting} would overwrite what {source} reads: name another place")


def _try(folder: Path) -> None:
    """Write in a folder, or in the one that it would be made in; raise OSError if that fails."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    with TemporaryFile(dir=existing):
        pass


def _check_bin(setting: str, config: Config) -> None:
    """Refuse what an R.bin has no place for, as far as settings and a loaded file tell."""
    learn, rotation = config.learn, config.rotation
    lost = {
        "learn.lr_clip": learn.steps and learn.lr_clip,
        "learn.lr_input_clip": learn.steps and learn.lr_input_clip,
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
            group, _, key = name.partition(".")
            raise InputError(
                f"{setting}: an R.bin holds R1 and R2 and nothing else, which does not go with "
                f"{name}={getattr(getattr(config, group), key)}: use .safetensors"
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


@contextmanager
def sole_writer(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside a target to write in, and keep other processes from it.

    What an earlier process left there is removed, and so is what this one leaves.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with _locked(target):
        for left in (partial, *_left_by_the_dead(target)):
            _remove(left)
        partial.mkdir()
        try:
            yield partial
        finally:
            _remove(partial)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold a lock beside a target that dies with its process, and goes when it is let go.

    Who waited for it may hold a file that is no longer there: it takes the next one.
    """
    path = target.with_name(f".{target.name}.lock")
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%-12s waiting for another process that writes %s", "export", target)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _left_by_the_dead(target: Path) -> Iterator[Path]:
    """Yield what processes that are gone left behind under the names of an earlier version."""
    for path in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            yield path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
