"""Records, read for tables and figures: the only source of their numbers, and their only reader.

A record of schema 1 has no identity. What is broken, unfinished or no record of a run is named and
left out; so is what would be averaged with records that were made otherwise.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from spinlab.config import ACCURACIES, accuracy_of_mean
from spinlab.errors import InputError

log = logging.getLogger(__name__)

Record = Mapping[str, Any]

_SCHEMAS = (1, 2, 3)
NAME = "record.json"  # of every run's record
_FOREIGN = "no record of a run"
_PARTS = {"schema": object, "experiment": object, "status": object, "config": dict, "metrics": dict}
_OF_ANY_RUN = {
    **_PARTS,
    **{"experiment": str, "status": str, "key": str, "overrides": list, "stages": list},
}
TWINS: Mapping[str, tuple[str, ...]] = {
    "fake": ("fake", "integer")
}  # one function, emulated or not


@dataclass
class Records:
    """Records by their files, and what was left out, with the reason."""

    kept: dict[Path, Record] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)

    def add(self, path: Path, record: Record | str) -> None:
        """Keep a record; leave out what has a reason in its place."""
        if isinstance(record, str):
            self.skip(path, record)
        else:
            self.kept[path] = record

    def skip(self, path: Path, reason: str) -> None:
        """Leave a file out, and say so."""
        log.warning("%s is left out: %s", path, reason)
        self.kept.pop(path, None)
        self.skipped[path] = reason

    @property
    def note(self) -> str:
        """How many files were left out, and why; empty where there are none."""
        reasons = [reason.partition(":")[0] for reason in self.skipped.values()]
        counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        told = "; ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"Left out of {len(self.kept) + len(reasons)} files: {told}." if told else ""


def read_record(path: Path) -> Record:
    """Return a record; raise InputError for what is none, or of a run that did not end well."""
    if isinstance(record := complete_record(path), str):
        raise InputError(f"{path}: {record}")
    return record


def any_record(path: Path) -> Record | str:
    """Return the record of a run, however it ended; the reason in place of what is none."""
    return _read(path, _OF_ANY_RUN)


def records_below(folder: Path) -> Iterator[tuple[Path, Record | str]]:
    """Yield what `any_record` makes of every run's record below a folder, in the order of paths."""
    for path in record_files(folder):
        if path.name == NAME:
            yield path, any_record(path)


def read_benchmark(word: str, place: str) -> Record:
    """Return the record of a benchmark, as it is. word: what names its file on a command line.

    Raises InputError for what has no metrics, or does not say what was measured, and on what.
    """
    found = _object(Path(place).expanduser())
    if isinstance(found, str):
        raise InputError(f"{word}={place} is no record of a benchmark: {found}")
    for name, kind in {"metrics": dict, "experiment": str, "environment": dict}.items():
        if not isinstance(found.get(name), kind):
            raise InputError(f"{word}={place} is no record of a benchmark: its {name} is missing")
    return found


def read_curve(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what a run's metrics.jsonl says of every step, and why it ends early, if it does.

    A kill may cut off its last line.
    """
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append({**row, "step": row["step"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return rows, f"broken behind {len(rows)} steps: {type(error).__name__}: {error}"
    return rows, ""


def complete_record(path: Path) -> Record | str:
    """Return the record of a run that ended well; the reason in place of any other."""
    record = _read(path, _PARTS)
    return record if isinstance(record, str) else _refused(record) or record


def _read(path: Path, parts: Mapping[str, type]) -> Record | str:
    """Return a record with these parts, in the names of today; the reason in place of what is none.

    A reason begins with the words that it is counted by.
    """
    record = _object(path)
    if isinstance(record, str):
        return record
    if not parts.keys() <= record.keys():
        return _FOREIGN
    if record["schema"] not in _SCHEMAS:
        return f"of another schema: {record['schema']!r}, and {_SCHEMAS} are read"
    if wrong := [name for name, kind in parts.items() if not isinstance(record[name], kind)]:
        return f"broken: {wrong[0]} is no {parts[wrong[0]].__name__}"
    return record | {"metrics": _renamed(record["metrics"], record["schema"])}


def _object(path: Path) -> dict[str, Any] | str:
    """Return what a JSON file holds by names; the reason in place of anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"broken: {type(error).__name__}: {error}"
    return found if isinstance(found, dict) else _FOREIGN


def _renamed(metrics: Mapping[str, float], schema: int) -> dict[str, float]:
    """Return metrics by the names of today, whatever a record's schema calls its variants."""
    old, new = ("/int4", "/integer") if schema < 3 else ("", "")
    return {name.removesuffix(old) + new * name.endswith(old): v for name, v in metrics.items()}


def _refused(record: Record) -> str:
    """Return why no table is made of a record."""
    if record["status"] != "complete":
        return f"not complete: its status is {record['status']!r}; run it again, or take it away"
    for name, value in record["metrics"].items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"broken: {name} is {value}, which is no number"
    return ""


def record_files(folder: Path) -> list[Path]:
    """Return in order what may be records below a folder: of runs, and outside of runs' folders.

    A run's record has one name, beside what else the run left; others are called as one likes.
    """
    files = sorted(folder.rglob("*.json"))
    runs = {path.parent for path in files if path.name == NAME}
    return [p for p in files if p.name == NAME or runs.isdisjoint(p.parents)]


def folders_of(places: str) -> list[Path]:
    """Return the folders that `records=` names, with commas. Raises InputError for what is none."""
    folders = [Path(place).expanduser() for place in places.split(",")]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise InputError(f"records={missing[0]} is no folder")
    return folders


def read_below(*folders: Path) -> Records:
    """Read all records below folders; what is broken or unfinished is left out, with a warning.

    Files that are no record, by their name and by what they hold, are passed over: benchmarks,
    summaries, and how the points of sweeps went.
    """
    found = Records()
    for path in sorted({path for folder in folders for path in record_files(folder)}):
        record = complete_record(path)
        if record == _FOREIGN and path.name != NAME:
            log.info("%s is passed over: %s", path, record)
        else:
            found.add(path, record)
    return found


def texts_of(metrics: Mapping[str, float]) -> list[str]:
    """Return the texts whose perplexity was measured, that of the calibration's kind first."""
    return sorted({k.split("/")[1] for k in metrics if k.startswith("ppl/")}, reverse=True)


def zeroshot_mean(
    metrics: Mapping[str, float], tasks: Sequence[str], chosen: Mapping[str, str], variant: str
) -> float | None:
    """Return a variant's mean accuracy over tasks in percent; None unless all were measured.

    chosen: by task, the accuracy that enters the mean (`accuracy_of_mean`). The emulation has the
    logits of the integer kernels, and is not always asked again.
    """
    for one in TWINS.get(variant, (variant,)):
        kinds = {task: accuracy_in(metrics, task, chosen, one) for task in tasks}
        if kinds and None not in kinds.values():
            return 100 * mean(metrics[f"zeroshot/{t}/{kind}/{one}"] for t, kind in kinds.items())
    return None


def accuracy_in(
    metrics: Mapping[str, float], task: str, chosen: Mapping[str, str], variant: str
) -> str | None:
    """Return which of the accuracies among metrics is a task's share of a variant's mean."""
    known = [kind for kind in ACCURACIES if f"zeroshot/{task}/{kind}/{variant}" in metrics]
    return accuracy_of_mean(task, chosen, known)
