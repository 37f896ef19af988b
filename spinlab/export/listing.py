"""The manifest.json of an export: what it is, the digests of its files, the run that it comes from.

Beside it lies a README.md that tells a reader the same (`spinlab.export.card`).

A file that changed, is missing or lies elsewhere makes it another export: `read_listing` refuses it
with a sentence, before anything else of it is read.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.export.card import card
from spinlab.export.identity import digest_of, digests_of, is_inside
from spinlab.files import write_json
from spinlab.model.files import LISTING, read_json

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


def read_listing(place: str, folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Return what a whole and unaltered export says of itself: what `write_listing` was told.

    place: how sentences call the folder. kind: that it must have; None takes any. Raises InputError
    for any other folder.
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
    if kind and about.get("export") != kind:
        raise InputError(f"{place} was written by export.{about.get('export')}, not export.{kind}")
    if about.get("version") != VERSION:
        raise InputError(
            f"{place} has the form {about.get('version')!r}, and this version of spinlab reads "
            f"{VERSION}: install the version that wrote it, or export it again"
        )
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
