"""What can be cleared away: runs that did not end well, and stages that no record names.

Nothing that a running process holds is touched (`spinlab.held`): it holds its run's folder, and
the whole of its cache, where it goes back to what it found.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spinlab.entries import entries, lock_of
from spinlab.held import is_held, unused
from spinlab.report.records import any_record
from spinlab.runs.found import Run


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


def unnamed(cache: Path, runs: Iterable[Run]) -> list[Waste]:
    """Return the stages in a cache that none of the runs' records names, and what killed ones left.

    A cache that a process works in has none: what that has found there is not all recorded yet.
    """
    if is_held(cache):
        return []
    named = {f"{stage['name']}-{stage['key']}" for run in runs for stage in run.record["stages"]}
    return [
        Waste(path, "of no record" if path == final else "progress of a killed stage", _size(path))
        for path, final in entries(cache)
        if path != final or final.name not in named
    ]


def remove_run(waste: Waste) -> bool:
    """Remove a run's folder unless a process took it up meanwhile; tell whether it is gone."""
    with unused(waste.folder) as free:
        record = any_record(waste.folder / "record.json")
        done = free and not isinstance(record, str) and record["status"] != "complete"
        if done:
            shutil.rmtree(waste.folder)
    return done


def remove_stages(cache: Path, stages: Iterable[Waste]) -> bool:
    """Remove stages unless a process took the cache up meanwhile; tell whether they are gone."""
    gone = {waste.folder for waste in stages}
    with unused(cache) as free:
        for path, final in entries(cache) if free else ():
            if path in gone:
                shutil.rmtree(path)
                lock_of(final).unlink(missing_ok=True)  # of nobody: all hold the cache first
    return free


def _is_own(run: Run) -> bool:
    """Tell whether a folder is one that a run made for itself, by its key."""
    return run.folder.name == run.record["key"]


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
