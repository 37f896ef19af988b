"""Texts in a user's files: plain UTF-8, or rows with a field `text`."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spinlab.errors import InputError

_FIELD = "text"


def read_file(path: Path) -> str:
    """Return the text of a file; rows of .json, .jsonl and .parquet are joined by blank lines.

    Raises InputError for what is no file, cannot be read, or holds no text.
    """
    if path.is_dir():
        raise InputError(f"text {path} is a folder: name a file in it")
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    try:
        text = _READERS.get(path.suffix.lower(), _plain)(path)
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {path} is not UTF-8 (byte {error.start}): convert it, or unpack it first"
        ) from None
    if strange := _strange(text):
        raise InputError(f"text file {path} holds {strange}: it is no plain text")
    if not text.strip():
        raise InputError(f"text file {path} holds no text")
    return text


def _strange(text: str) -> str | None:
    """Name a character that no text has: NUL, or half a surrogate pair, which JSON may spell."""
    found = re.search("[\0\ud800-\udfff]", text)
    return repr(found[0]) if found else None


def _plain(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark


def _json(path: Path) -> str:
    """Read a list of rows, or one row per line."""
    content = _plain(path)
    try:
        rows = json.loads(content)
    except json.JSONDecodeError:
        rows = [
            _row(path, n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()
        ]
    return _joined(path, rows if isinstance(rows, list) else [rows])


def _row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"text file {path}, line {number}: {error}; it must be one object per line, or a list "
            "of them"
        ) from error


def _parquet(path: Path) -> str:
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
        rows = parquet.read_table(path, columns=[n for n in names if n == _FIELD]).to_pylist()
    except ArrowException as error:
        raise InputError(f"text file {path} is not Parquet: {error}") from error
    return _joined(path, rows if _FIELD in names else [dict.fromkeys(names)])


def _joined(path: Path, rows: list[Any]) -> str:
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row.get(_FIELD) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else "it is a value"
            raise InputError(
                f"text file {path}, row {number} has no string in the field {_FIELD!r}: {has}"
            )
        texts.append(text)
    return "\n\n".join(texts)


_READERS: Mapping[str, Callable[[Path], str]] = {
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
