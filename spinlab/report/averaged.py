"""Records that a table averages: those of one setting with several seeds, made alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.report.records import NAME, Record, Records, complete_record, record_files
from spinlab.report.settings import settings_of

_OF_QUESTIONS = ("eval.task", "eval.limit")  # what settings of questions begin with
_OF_A_RUN = ("seed", "runtime", "tracker", "sweep", "name")  # may differ where a table has a mean


def read_seeds(folder: Path, prefix: str = "") -> dict[str, list[Record]]:
    """Return the records `<prefix><name>_seed<N>.json` of a folder by name, in the order of seeds.

    In a folder of runs, which has no such files, a record's name is the end of its experiment's.
    What would not make one row with the others of its name is left out, with a warning. Raises
    InputError where there are none.
    """
    found, files = Records(), sorted(folder.glob(f"{prefix}*_seed*.json"))
    of_runs = [path for path in record_files(folder) if path.name == NAME and not prefix]
    for path in files or of_runs:
        found.add(path, complete_record(path))
    named: dict[str, dict[Path, Record]] = {}
    for path, record in found.kept.items():
        name = path.stem.removeprefix(prefix).rpartition("_seed")[0]
        name = name if files else str(record["experiment"]).rpartition("/")[2]
        named.setdefault(name, {})[path] = record
    for records in named.values():
        for path, reason in (_unlike(records) | seeds_of(records)[1]).items():
            found.skip(path, reason)
    rows = {
        name: sorted((r for path, r in rs.items() if path in found.kept), key=_seed)
        for name, rs in named.items()
    }
    if not rows:
        left = "".join(f"; {path.name}: {reason}" for path, reason in found.skipped.items())
        raise InputError(f"{folder} holds no records {prefix}<name>_seed<N>.json, nor runs{left}")
    return rows


def _seed(record: Record) -> int:
    return record["config"].get("seed", 0)


def seeds_of(records: Mapping[Path, Record]) -> tuple[dict[Path, Record], dict[Path, str]]:
    """Return the records of one row that may be averaged, and why the others may not.

    They are of the newest schema among them, and each has a seed of its own.
    """
    newest = max((record["schema"] for record in records.values()), default=0)
    chosen: dict[Path, Record] = {}
    left: dict[Path, str] = {}
    seeds: dict[Any, str] = {}
    for path, record in records.items():
        seed = record["config"].get("seed")
        if record["schema"] < newest:
            left[path] = f"older than others of its row: schema {record['schema']}"
        elif seed in seeds:
            left[path] = f"a second one with its seed: {seeds[seed]} has {seed} too"
        else:
            chosen[path] = record
            seeds[seed] = _named(path)
    return chosen, left


def _named(path: Path) -> str:
    """Return what tells a record from others: its file, or the folder of a run."""
    return path.parent.name if path.name == NAME else path.name


def _unlike(records: Mapping[Path, Record]) -> dict[Path, str]:
    """Return those of a row that were not made as the first of its newest records, and why.

    How questions are asked is held against the first that asks any; it tells nothing of the others.
    """
    chosen = seeds_of(records)[0]
    first = next(iter(chosen))
    asking = next((path for path, record in chosen.items() if asked([record])), first)
    found: dict[Path, str] = {}
    for path, record in chosen.items():
        told = [_other_than(chosen[first], record, first, of_questions=False)]
        if asked([record]):
            told.append(_other_than(chosen[asking], record, asking, of_questions=True))
        if any(told):
            found[path] = f"unlike others of its row: {', '.join(filter(None, told))}"
    return found


def _other_than(model: Record, record: Record, path: Path, of_questions: bool) -> str:
    """Say which settings of a record are not those of another, at a path: of questions, or not."""
    names = [n for n in differing(record, model) if n.startswith(_OF_QUESTIONS) == of_questions]
    return f"{', '.join(names)} is not that of {_named(path)}" if names else ""


def asked(runs: Sequence[Record]) -> list[Record]:
    """Return those records whose settings ask questions, which may be none."""
    return [run for run in runs if run["config"].get("eval", {}).get("tasks", True)]


def differing(one: Record, other: Record) -> list[str]:
    """Name the settings in which a record differs from another, but for those of a single run."""
    a, b = settings_of(one), settings_of(other)
    names = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
    return [name for name in names if name.split(".")[0] not in _OF_A_RUN]
