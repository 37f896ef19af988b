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

from spinlab.errors import InputError

log = logging.getLogger(__name__)


def place_of(path: str) -> Path:
    """Return the place that a setting names, behind `~` and links."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def check_not_read(setting: str, target: Path, source: str, path: str | None) -> None:
    """Raise InputError for a place that a setting reads."""
    if path and place_of(path) == target:
        raise InputError(f"{setting} would overwrite what {source} reads: name another place")


def try_to_write(folder: Path) -> None:
    """Write in a folder, or in the one that it would be made in; raise OSError if that fails."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    with TemporaryFile(dir=existing):
        pass


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
