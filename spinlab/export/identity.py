"""How an exported checkpoint is known: an entry in its config, and a manifest of what it lacks.

The entry `spinlab` of config.json holds the manifest's digest, the manifest those of all other
files. So a folder that lost its manifest is not taken for an ordinary checkpoint, nor one whose
files are no longer those that belong to it. Other tools ignore the entry.
"""

import json
import logging
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any

from spinlab import parallel
from spinlab.errors import InputError
from spinlab.files import content_key, file_digest, write_json
from spinlab.model.checkpoint import content_digest
from spinlab.model.files import CONFIG, EXPORTED, LISTING, MANIFEST, read_json
from spinlab.rotation.stored import read_about

log = logging.getLogger(__name__)

UNFINISHED = {"export": "unfinished", "version": 0}  # what a folder says while it is written over


def digests_of(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder, by its name there, but for a manifest."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    names = (file.relative_to(folder).as_posix() for file in files)
    return {name: digest_of(folder / name) for name in names if name not in (MANIFEST, LISTING)}


def mark(folder: Path) -> None:
    """Write into a checkpoint's config which manifest belongs to it."""
    settings = _settings(folder)
    write_json(folder / CONFIG, {**settings, EXPORTED: {MANIFEST: file_digest(folder / MANIFEST)}})


def files_of(folder: Path) -> set[str] | None:
    """Return the names of the files that an export is made of; None if it does not tell."""
    if is_listed(folder):
        return {*read_json(folder / LISTING)["files"], LISTING}
    listed = read_about(folder / MANIFEST).get("files")
    return None if listed is None else {*listed, MANIFEST}


def is_listed(folder: Path) -> bool:
    """Tell whether a folder is an export with a list of its files (`spinlab.export.listing`)."""
    try:
        listing = read_json(folder / LISTING)
    except InputError:
        return False
    about, files = listing.get("spinlab"), listing.get("files")
    if not isinstance(about, dict) or not isinstance(files, dict):
        return False
    ours = isinstance(about.get("export"), str) and isinstance(about.get("version"), int)
    return ours and all(is_inside(name) for name in files)


def is_inside(name: str) -> bool:
    """Tell whether a file's name in a manifest is that of a file below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def warn_of_dtype(manifest: Path, dtype: str) -> None:
    """Say so where an exported checkpoint is run in another dtype than it was rotated in."""
    before = read_about(manifest).get("model", {}).get("dtype", dtype)
    if before != dtype:
        log.warning(
            "%s was rotated and rounded in %s: with model.dtype=%s its numbers are not those of "
            "the run that wrote it",
            manifest.parent,
            before,
            dtype,
        )


def manifest_of(path: str | None) -> Path | None:
    """Return the manifest of an exported checkpoint; None for an ordinary one.

    Raises InputError for an export without its manifest, or with files that are not its own.
    """
    folder = Path(path or "").expanduser()
    manifest, marked = folder / MANIFEST, _settings(folder).get(EXPORTED)
    if not path or (marked is None and not isfile(manifest)):
        return None
    if not isfile(manifest):
        raise InputError(
            f"model.path={path} is an exported model that lost its {MANIFEST}, which holds what "
            f"its weights lack: export it again, or delete {EXPORTED!r} from its {CONFIG} to take "
            "its weights for an ordinary checkpoint"
        )
    listed = read_about(manifest).get("files")
    if listed is None:
        log.warning("%s comes from an earlier version: its files cannot be checked", folder)
        return manifest
    entry = marked if isinstance(marked, dict) else {}
    expected = {MANIFEST: entry.get(MANIFEST), **listed}
    fault = parallel.share(_fault(folder, expected) if parallel.is_main() else None)
    if fault:
        raise InputError(
            f"model.path={path} is an exported model, and {fault} was exported: export it again"
        )
    return manifest


def _fault(folder: Path, expected: dict[str, str | None]) -> str | None:
    """Name the first file that is not what its manifest lists."""
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing of what"
        if digest_of(folder / name) != digest:
            return f"{name} changed since"
    return None


def digest_of(path: Path) -> str:
    """Return a file's digest; that of a config leaves out the entry that names the manifest."""
    if path.name != CONFIG:
        return content_digest(path)
    settings = _settings(path.parent)
    settings.pop(EXPORTED, None)
    return content_key(settings)


def _settings(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json holds; nothing if it is none, which loading tells."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
