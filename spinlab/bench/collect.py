"""Gather the records of several runs of a benchmark in one."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spinlab.bench.results import SCHEMA
from spinlab.errors import InputError

_KEPT = ("experiment", "environment", "config")


def collect(paths: Sequence[Path], experiment: str) -> dict[str, Any]:
    """Return one record of all metrics; `parts` keeps what each run ran on, and its metrics' names.

    A metric that several records have is the last one's. `peer/best/…` is added: how many times
    the time of the fastest peer ours is, by phase and case. Those of a whole network get the method
    whose rotations it runs: speedup/e2e/prefill/<method>/b1.
    """
    parts: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for path in paths:
        record = _read(path)
        for part in _parts(record):
            metrics.update(part["metrics"])
            parts = [_without(other, part["metrics"]) for other in parts]
            parts.append(part)
        skipped.update(record.get("skipped", {}))
    skipped = {name: why for name, why in skipped.items() if name not in metrics}
    kept = [{**part, "metrics": sorted(part["metrics"])} for part in parts if part["metrics"]]
    return {
        "schema": SCHEMA,
        "experiment": experiment,
        "environment": kept[-1]["environment"] if kept else {},
        "parts": kept,
        "metrics": metrics | best_peers(metrics),
        "skipped": skipped,
    }


def best_peers(metrics: dict[str, float]) -> dict[str, float]:
    """Return peer/best/<phase>/<case> for every case that a peer multiplied."""
    best: dict[str, float] = {}
    for name, value in metrics.items():
        words = name.split("/")
        if words[0] == "peer" and len(words) == 4 and words[1] != "best":
            case = f"peer/best/{words[2]}/{words[3]}"
            best[case] = max(value, best.get(case, 0.0))
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no record: {error}") from error


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a record, each with its metrics: the record itself, if it is of one."""
    if "parts" not in record:
        return [{**{k: record[k] for k in _KEPT}, "metrics": _by_method(record)}]
    found = record["metrics"]
    return [{**p, "metrics": {n: found[n] for n in p["metrics"]}} for p in record["parts"]]


def _by_method(record: dict[str, Any]) -> dict[str, float]:
    """Return a run's metrics; where it is of a whole network, they name what that runs online."""
    config = record["config"]
    if "method" not in config:
        return dict(record["metrics"])
    method = config["method"] or "hadamards"
    method += "_rounded" * (config["settings"].get("rotation.factors") == "bfloat16")
    named = re.compile(r"(?<=/e2e/)(\w+)")
    return {named.sub(rf"\1/{method}", n): value for n, value in record["metrics"].items()}


def _without(part: dict[str, Any], newer: dict[str, float]) -> dict[str, Any]:
    left = {name: value for name, value in part["metrics"].items() if name not in newer}
    return {**part, "metrics": left}
