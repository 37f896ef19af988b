"""Folders in use: who works in one holds it, so that nobody clears it away.

A hold is a lock of the system, shared by all that work in the folder. It ends with its process,
however that ends.
"""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = "in-use.lock"


class Hold:
    """Hold a folder, which is made if need be, until `release` or the end of this object."""

    def __init__(self, folder: Path) -> None:
        self.release = weakref.finalize(self, os.close, _shared(folder))


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Yield whether nobody holds a folder that exists; whoever wants to hold it waits meanwhile."""
    number = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(number)


def is_held(folder: Path) -> bool:
    """Tell whether a process works in a folder; nothing is written there."""
    try:
        number = os.open(folder / _NAME, os.O_RDONLY)
    except OSError:  # nobody ever did, or it is not ours to read
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


def _shared(folder: Path) -> int:
    """Return the descriptor of a shared lock, once nobody clears the folder away."""
    path = folder / _NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(number, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
        except FileNotFoundError:
            pass
        os.close(number)  # the folder was cleared away while this waited
