"""Runs found by their records, as names and values that can be filtered and compared."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spinlab.config.values import values_of, words_of
from spinlab.errors import InputError
from spinlab.held import is_held
from spinlab.report.records import Record, any_record, records_below


@dataclass(frozen=True)
class Run:
    """A run: its folder and its record, and that of a repetition which did not end."""

    folder: Path
    record: Record
    repeated: Record | None = None

    @property
    def state(self) -> str:
        """complete, running, killed, interrupted or failed."""
        status = self.record["status"].partition(":")[0]
        return "killed" if status == "running" and not is_held(self.folder) else status

    @property
    def stages(self) -> set[str]:
        """The names of the folders that its stages have in a cache."""
        records = (self.record, *([self.repeated] if self.repeated else []))
        return {f"{stage['name']}-{stage['key']}" for r in records for stage in r["stages"]}

    @cached_property
    def values(self) -> dict[str, Any]:
        """What it can be found by: settings, then names that its command chose, then metrics."""
        record = self.record
        own = {"experiment": record["experiment"], "key": record["key"], "state": self.state}
        settings = values_of(record["config"])
        return words_of(record["overrides"]) | settings | own | record["metrics"]


def find(folder: Path) -> tuple[list[Run], dict[Path, str]]:
    """Return the runs below a folder, the latest last, and why other records are left out.

    Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the one that the runs are in, as --runs=…")
    runs: list[Run] = []
    left: dict[Path, str] = {}
    for path, record in records_below(folder):
        other = path.with_name("unfinished.json")
        repeated = any_record(other) if other.exists() else None
        left |= {p: r for p, r in ((path, record), (other, repeated)) if isinstance(r, str)}
        if not isinstance(record, str):
            runs.append(Run(path.parent, record, None if isinstance(repeated, str) else repeated))
    return sorted(runs, key=lambda run: (run.folder / "record.json").stat().st_mtime), left


def one(runs: list[Run], start: str) -> Run:
    """Return the run whose key has this start. Raises InputError unless there is one."""
    found = [run for run in runs if run.record["key"].startswith(start)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"no run has a key that starts with {start!r}: list them without a word")
    names = ", ".join(str(run.folder) for run in found)
    raise InputError(f"{len(found)} runs have keys that start with {start!r}: {names}")
