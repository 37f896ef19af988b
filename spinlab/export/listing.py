"""The manifest.json of an export: what it is, the digests of its files, the run that it comes from.

Beside it lies a README.md that tells a reader the same (`spinlab.export.card`).

A file that changed, is missing or lies elsewhere makes it another export: `read_listing` refuses it
with a sentence, before anything else of it is read.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.export.card import card
from spinlab.export.identity import UNFINISHED, digest_of, digests_of, is_inside
from spinlab.files import write_json
from spinlab.model.files import LISTING, files_like, read_json

CARD = "README.md"
VERSION = 1  # of the form of every kind of export
# how a record came to be is left out: its stages, trackers and status
_OF_RECORD = (
    *("experiment", "key", "identity", "model", "config", "overrides", "environment", "metrics"),
)


def write_listing(
    folder: Path, kind: str, record: Mapping[str, Any], told: Mapping[str, Any] | None = None
) -> None:
    """Write the card of an export and list what it is made of, once all other files are there.

    kind: the name of its setting, without `export.`. record: of the run, as `Subject` has it. told:
    what else belongs into it, ready for JSON.
    """
    about = {**about_export(kind, record), **(told or {})}
    (folder / CARD).write_text(card(kind, record, told), encoding="utf-8")
    write_json(folder / LISTING, {"spinlab": about, "files": digests_of(folder)})


def about_export(kind: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export says of itself: its kind, the version of its form, its run."""
    kept = {name: record[name] for name in _OF_RECORD if name in record}
    return {"export": kind, "version": VERSION, "record": kept}


def read_listing(
    place: str,
    folder: Path,
    kind: str | None = None,
    needs: Iterable[str] = (),
    reads: Iterable[str] = (),
) -> dict[str, Any]:
    """Return what a whole and unaltered export says of itself: what `write_listing` was told.

    place: how sentences call the folder. kind: that it must have; None takes any. needs: files that
    must be listed. reads: patterns of files that are read if they are there, and listed then.
    Raises InputError for any other folder.
    """
    wanted = f"export.{kind}" if kind else "an export"
    if not folder.is_dir():
        raise InputError(f"{place} is no folder: name one that {wanted} wrote")
    if not (folder / LISTING).is_file():
        raise InputError(f"{place} holds no {LISTING}: name a folder that {wanted} wrote")
    listing = read_json(folder / LISTING)
    about, files = listing.get("spinlab"), listing.get("files")
    if not isinstance(about, dict) or not isinstance(files, dict):
        raise InputError(f"{place}: its {LISTING} is none of spinlab's")
    if about == UNFINISHED:
        raise InputError(f"{place} was being written over when that was cut off: export it again")
    if not isinstance(about.get("export"), str) or not isinstance(about.get("record"), dict):
        raise InputError(f"{place}: its {LISTING} does not say what was exported, of which run")
    if kind and about.get("export") != kind:
        raise InputError(f"{place} was written by export.{about.get('export')}, not export.{kind}")
    if about.get("version") != VERSION:
        raise InputError(
            f"{place} has the form {about.get('version')!r}, and this version of spinlab reads "
            f"{VERSION}: install the version that wrote it, or export it again"
        )
    if missing := [name for name in needs if name not in files]:
        raise InputError(f"{place}: its {LISTING} does not list {missing[0]}: export it again")
    names = {file.relative_to(folder).as_posix() for file in files_like(folder, reads)}
    if unknown := sorted(names - files.keys()):
        raise InputError(f"{place} holds {unknown[0]}, which is not of the export: take it away")
    _check_files(place, folder, files)
    return about


def _check_files(place: str, folder: Path, files: Mapping[str, Any]) -> None:
    """Raise InputError for a file that is not what was written, or does not lie in the folder."""
    for name in files:
        if not is_inside(name):
            raise InputError(f"{place}: its {LISTING} names {name}, which is not in the folder")
        if not (folder / name).is_file():
            raise InputError(f"{place} lacks {name}: copy or export it again")
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: digest_of(folder / name), files)
        for name, digest in zip(files, found, strict=True):
            if digest != files[name]:
                raise InputError(f"{place}: {name} changed since it was exported: export it again")
