"""Files: digests, and JSON that is on the disk whole or not at all (the ground floor).

What is written goes to a temporary name, to the disk, and then to its place: a kill, a crash or a
full disk leaves the old file or the new one.
"""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from spinlab.errors import InputError

_TEMPORARY = ".tmp"  # in every temporary name, ours and those of safetensors
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # file systems that bring no folder to the disk

# digests ----------------------------------------------------------------------------------


def content_key(content: Any) -> str:
    """Return 16 hex digits that identify JSON-ready content."""
    return hashlib.sha256(canonical(content)).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(content: Any) -> bytes:
    """Return JSON-ready content as bytes, the same for the same content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


# writing ----------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what was written there is brought to the disk and to `path`.

    Temporary files of `path` whose process is gone are removed. An error of the system names the
    file, which a failed write by itself does not.
    """
    for left in path.parent.glob(f"*{_TEMPORARY}-*"):
        name, _, process = left.name.rpartition(f"{_TEMPORARY}-")
        if name == path.name and process.isdigit() and not psutil.pid_exists(int(process)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{path.name}{_TEMPORARY}-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        number, place = _refusal(error)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(place or path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(number)


def is_temporary(path: Path) -> bool:
    """Tell whether a file is what a killed writer left of another one."""
    return _TEMPORARY in path.name


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON, whole or not at all."""
    text = json.dumps(content, sort_keys=True, indent=2) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# what cannot be written -------------------------------------------------------------------


@contextmanager
def writing(folder: Path, setting: str) -> Iterator[None]:
    """Turn the system's refusal to write below `folder` into an InputError that names the cure.

    setting: the one that chose the folder. A refusal elsewhere is left as it is. Where the error
    names no file, what others write meanwhile may be it: a download, a compiler.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, place = _refusal(error)
        if number not in (_FULL if place is None else _FULL | _REFUSED):
            raise
        if place is not None and not _is_below(place, folder):
            raise
        cure = f"set {setting} to a folder that can be written"
        if number in _FULL:
            cure = (
                "free some space and start again, which goes on with what is finished, or set "
                f"{setting} to a folder on another disk"
            )
        reason = os.strerror(number)
        what = place or f"a file below {folder} or elsewhere, which the system does not name"
        raise InputError(f"cannot write {what}: {reason}: {cure}") from error


def check_writable(folder: Path, setting: str) -> None:
    """Make a folder and write into it; raise InputError if that cannot be done."""
    with writing(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"spinlab")


def _refusal(error: OSError | SafetensorError) -> tuple[int, Path | None]:
    """Return the system's error number, 0 if it has none, and the file if it is known."""
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str | os.PathLike) else None
        return error.errno or 0, Path(name) if name else None
    found = re.search(r"\(os error (\d+)\)(?: at path \"(.*)\")?", str(error))
    return (int(found[1]), Path(found[2]) if found[2] else None) if found else (0, None)


def _is_below(path: Path, folder: Path) -> bool:
    """Tell whether a path is a folder, or in it, or above it where the folder cannot be made."""
    whole, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return whole.is_relative_to(base) or base.is_relative_to(whole)
