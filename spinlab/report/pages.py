"""Pages with tables: what stands between two marks is rebuilt, the words around it stay.

    <!-- table: <kind> <file or folder of records> <more words> -->
    <!-- end -->
    <!-- file: <kind> <file or folder of records> <more words> -->

A table is Markdown between its marks; a file is made beside the records, for the page to link.
Kinds are those of `spinlab.report.tables`; paths of records are relative to the repository, those
among more words too.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.report.tables import FILES, KINDS

_TABLE = re.compile(r"<!-- table: (?P<words>.+) -->\n(?P<old>(?:.*\n)*?)<!-- end -->")
_FILE = re.compile(r"<!-- file: (?P<words>.+) -->")
_NOT_OURS = ("runs", "node_modules")  # folders whose pages are not the repository's


def rebuilt(page: str, root: Path) -> str:
    """Return a page with all its tables made anew from the records below `root`.

    Raises InputError for a kind that does not exist, or does not take the words of its mark.
    """

    def table(mark: re.Match[str]) -> str:
        made = _made(KINDS, mark, root)
        return f"<!-- table: {mark['words']} -->\n{made}\n<!-- end -->"

    return _TABLE.sub(table, page)


def make_files(page: str, root: Path) -> list[Path]:
    """Make the files that a page has marks of; return them. Raises InputError as `rebuilt`."""
    return [_made(FILES, mark, root) for mark in _FILE.finditer(page)]


def _made(kinds: Mapping[str, Callable[..., Any]], mark: re.Match[str], root: Path) -> Any:
    kind, *words = mark["words"].split()
    told = mark[0].splitlines()[0]
    if kind not in kinds:
        raise InputError(f"{told}: kinds are {', '.join(kinds)}")
    try:
        inspect.signature(kinds[kind]).bind(*words)
    except TypeError as error:
        raise InputError(f"{told}: {error}") from error
    place = root.absolute() / words[0]
    with chdir(root):  # records may be among the other words too
        return kinds[kind](place, *words[1:])


def pages(root: Path) -> list[Path]:
    """Return the pages of a repository that hold marks, the README first."""
    every = (path for path in sorted(root.rglob("*.md")) if _is_ours(path.relative_to(root)))
    found = [p for p in every if _has_marks(p.read_text(encoding="utf-8"))]
    return sorted(found, key=lambda page: page != root / "README.md")


def _is_ours(path: Path) -> bool:
    return not any(part.startswith(".") or part in _NOT_OURS for part in path.parts)


def _has_marks(page: str) -> bool:
    return bool(_TABLE.search(page) or _FILE.search(page))
