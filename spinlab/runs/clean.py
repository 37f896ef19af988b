"""What can be cleared away: runs that did not end well, and stages that no record names.

Nothing that a running process holds is touched (`spinlab.held`): it holds its run's folder, and
the whole of its cache, where it goes back to what it found.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spinlab.entries import entries, lock_of
from spinlab.held import unused
from spinlab.report.records import any_record
from spinlab.runs.found import Run, find


@dataclass(frozen=True)
class Waste:
    """A folder that nobody needs, why, and the bytes that it takes."""

    folder: Path
    reason: str
    size: int


def unfinished(runs: Iterable[Run]) -> list[Waste]:
    """Return the folders of runs that were killed, interrupted or failed."""
    return [
        Waste(run.folder, run.state, _size(run.folder))
        for run in runs
        if run.state not in ("complete", "running") and _is_own(run)
    ]


def unnamed(cache: Path, staying: Iterable[Run], going: Iterable[Run] = ()) -> list[Waste]:
    """Return the stages in a cache that no run which stays names, and what killed ones left.

    The cache must be in nobody's use: what a process has found there is not all recorded yet.
    """
    named = {name for run in staying for name in run.stages}
    of_going = {name for run in going for name in run.stages}

    def reason(path: Path, final: Path) -> str:
        if path != final:
            return "progress of a killed stage"
        return "of a run that goes" if final.name in of_going else "of no record"

    return [
        Waste(path, reason(path, final), _size(path))
        for path, final in entries(cache)
        if path != final or final.name not in named
    ]


def remove_runs(away: Iterable[Waste]) -> list[str]:
    """Remove runs unless a process took them up meanwhile; return which stay, and why."""
    told = ((waste.folder, _run_stays(waste.folder)) for waste in away)
    return [f"{folder}: {reason}" for folder, reason in told if reason]


def remove_stages(cache: Path, stages: Iterable[Waste], runs: Path) -> list[str]:
    """Remove stages unless a process took the cache up meanwhile; return which stay, and why.

    runs: the folder of the runs. It is read again, for a run may have ended since it was read, and
    one that was to go may have stayed.
    """
    gone = {waste.folder for waste in stages}
    try:
        with unused(cache) as free:
            if not free:
                return [f"the stages in {cache}: in use by now"]
            named = {name for run in find(runs)[0] for name in run.stages}
            told = [(p, _stage_stays(p, final, named)) for p, final in entries(cache) if p in gone]
    except OSError as error:  # its lock cannot be written
        return [f"{cache}: {error.strerror}"]
    return [f"{path}: {reason}" for path, reason in told if reason]


def _run_stays(folder: Path) -> str | None:
    """Remove a run's folder; return why it stays."""
    if not folder.is_dir():
        return None
    try:
        with unused(folder) as free:
            record = any_record(folder / "record.json")
            if not free or isinstance(record, str) or record["status"] == "complete":
                return "in use by now"
            return _folder_stays(folder)
    except OSError as error:  # its lock cannot be written
        return error.strerror


def _stage_stays(folder: Path, final: Path, named: set[str]) -> str | None:
    """Remove a stage's folder and its lock; return why it stays."""
    if folder.name in named:
        return "named by a record"
    reason = _folder_stays(folder)
    if reason is None:
        lock_of(final).unlink(missing_ok=True)  # of nobody: all hold the cache first
    return reason


def _folder_stays(folder: Path) -> str | None:
    """Remove a folder; return why the system refuses that."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # somebody else removed it
        return None
    except OSError as error:
        return error.strerror
    return None


def _is_own(run: Run) -> bool:
    """Tell whether a folder is one that a run made for itself, by its key."""
    return run.folder.name == run.record["key"]


def _size(folder: Path) -> int:
    """Return the bytes of what can be looked at below a folder."""
    size = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError, PermissionError):
                size += os.lstat(os.path.join(place, name)).st_size
    return size
