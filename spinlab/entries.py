"""What lies in a cache: the results of stages, what killed ones left, and their locks."""

import re
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial"
_ENTRY = re.compile(rf"[\w-]+-[0-9a-f]{{16}}({re.escape(_PARTIAL)})?")


def final_of(root: Path, stage: str, key: str) -> Path:
    """Return the folder of a stage's result."""
    return root / f"{stage}-{key}"


def partial_of(final: Path) -> Path:
    """Return the folder that a stage works in until its result is whole."""
    return final.with_name(final.name + _PARTIAL)


def lock_of(final: Path) -> Path:
    """Return the file that a process locks while it looks at a stage or works on it."""
    return final.with_name(final.name + ".lock")


def entries(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folders that stages made in a cache, each with that of its result, in order.

    A link to a folder is none: what it leads to is somebody else's.
    """
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and _ENTRY.fullmatch(path.name):
            yield path, path.with_name(path.name.removesuffix(_PARTIAL))
