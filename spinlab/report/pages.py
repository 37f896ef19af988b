"""Pages with tables: what stands between two marks is rebuilt, the words around it stay.

    <!-- table: <kind> <file or folder of records> <more words> -->
    <!-- end -->

Kinds are those of `spinlab.report.tables`; paths are relative to the repository.
"""

import re
from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.tables import KINDS

_TABLE = re.compile(r"<!-- table: (?P<words>.+) -->\n(?P<old>(?:.*\n)*?)<!-- end -->")


def rebuilt(page: str, root: Path) -> str:
    """Return a page with all its tables made anew from the records below `root`.

    Raises InputError for a kind that does not exist.
    """

    def table(mark: re.Match[str]) -> str:
        kind, place, *more = mark["words"].split()
        if kind not in KINDS:
            raise InputError(f"<!-- table: {mark['words']} -->: kinds are {', '.join(KINDS)}")
        made = KINDS[kind](root / place, *more)
        return f"<!-- table: {mark['words']} -->\n{made}\n<!-- end -->"

    return _TABLE.sub(table, page)


def pages(root: Path) -> list[Path]:
    """Return the pages of a repository that hold tables: the README and those of its records."""
    found = [root / "README.md", *sorted((root / "experiments").glob("*.md"))]
    return [page for page in found if _TABLE.search(page.read_text(encoding="utf-8"))]
