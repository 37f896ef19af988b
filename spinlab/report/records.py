"""Records of runs, read for tables: the only source of their numbers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spinlab.errors import InputError

Record = Mapping[str, Any]

_PARTS = {  # what is read of a record of any run
    "schema": int, "experiment": str, "key": str, "status": str, "config": dict, "metrics": dict,
    "overrides": list, "stages": list,
}  # fmt: skip


def read_record(path: Path) -> Record:
    """Return a record; raise InputError for one of a run that did not end well."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["status"] != "complete":
        raise InputError(f"{path} is not complete: run it again, or take it away")
    return record | {"metrics": _renamed(record["metrics"], record.get("schema", 1))}


def _renamed(metrics: Mapping[str, float], schema: int) -> dict[str, float]:
    """Return metrics by the names of today, whatever a record's schema calls its variants."""
    old, new = ("/int4", "/integer") if schema < 3 else ("", "")
    return {name.removesuffix(old) + new * name.endswith(old): v for name, v in metrics.items()}


def any_record(path: Path) -> Record | str:
    """Return the record of a run, however it ended; the reason in place of what is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    if not isinstance(record, dict):
        return "it is no record of a run"
    for name, kind in _PARTS.items():
        if not isinstance(record.get(name), kind):
            return f"it is no record of a run, or one of another version: it has no {name}"
    return record | {"metrics": _renamed(record["metrics"], record["schema"])}


def records_below(folder: Path) -> Iterator[tuple[Path, Record | str]]:
    """Yield what `any_record` makes of every record.json below a folder, in the order of paths."""
    for path in sorted(folder.rglob("record.json")):
        yield path, any_record(path)


def read_seeds(folder: Path, prefix: str = "") -> dict[str, list[Record]]:
    """Return the records `<prefix><name>_seed<N>.json` of a folder by name, in the order of seeds.

    Raises InputError where there are none.
    """
    found: dict[str, list[Record]] = {}
    for path in sorted(folder.glob(f"{prefix}*_seed*.json")):
        name = path.stem.removeprefix(prefix).rpartition("_seed")[0]
        found.setdefault(name, []).append(read_record(path))
    if not found:
        raise InputError(f"{folder} holds no records {prefix}<name>_seed<N>.json")
    return found


def texts_of(metrics: Mapping[str, float]) -> list[str]:
    """Return the texts whose perplexity was measured, that of the calibration's kind first."""
    return sorted({k.split("/")[1] for k in metrics if k.startswith("ppl/")}, reverse=True)
