"""The table of methods: every method of the field on one model, mean and spread over seeds."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spinlab.errors import InputError
from spinlab.report.table import markdown

# in the order of the table; a method without records is left out
METHODS = {
    "rtn": "no transform",
    "gptq": "no transform",
    "smoothquant": "SmoothQuant",
    "random": "random orthogonal R1, R2; Hadamard R3, R4",
    "quarot": "random Hadamard (QuaRot)",
    "quarot_own": "QuaRot in its own formats",
    "duquant": "DuQuant as published",
    "duquant_legacy": "DuQuant, the public code's index",
    "duquant_gptq": "DuQuant's transforms",
    "duquant_learned": "DuQuant as start, learned",
    "spinquant_no_had": "SpinQuant no_had",
    "spinquant_had": "SpinQuant had",
    "spinquant_no_had_riemannian": "SpinQuant no_had, Riemannian clip",
    "spinquant_had_riemannian": "SpinQuant had, Riemannian clip",
    "learned_ranges": "Hadamard, learned with W4 and ranges",
    "learned_inputs": "DuQuant as start, all learned with W4",
}
_TEXTS = ("wiki", "c4")


def read_complete(path: Path) -> dict[str, Any]:
    """Return a record; raise InputError for one of a run that did not end well."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["status"] != "complete":
        raise InputError(f"{path} is not complete: run it again, or take it away")
    return record


def read_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records `<method>_seed<N>.json` of a folder by method, in the order of seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*_seed*.json")):
        method, _, _ = path.stem.rpartition("_seed")
        found.setdefault(method, []).append(read_complete(path))
    if unknown := found.keys() - METHODS.keys():
        raise InputError(f"methods without a title in spinlab.report.methods: {sorted(unknown)}")
    return found


def methods_table(records: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table with one row per method, after the original's."""
    originals = [r for runs in records.values() for r in runs]
    rows = [
        ["method", "transform", "weights", "learned", "seeds", *(f"{text} ppl" for text in _TEXTS)]
    ]
    rows.append(["", "original", "16 bits", "", "", *_perplexities(originals, "fp")])
    for method, title in METHODS.items():
        if runs := records.get(method):
            config = runs[0]["config"]
            cells = [
                method,
                title,
                config["weights"]["method"].upper(),
                _learned(config),
                str(len(runs)),
            ]
            rows.append([*cells, *_perplexities(runs, "fake")])
    return markdown(rows)


def _learned(config: dict[str, Any]) -> str:
    """Say on how much text rotations were learned."""
    learn = config["learn"]
    if learn["steps"] == 0:
        return ""
    return f"{learn['steps']} x {learn['batch']} x {learn['sequence_length']}"


def _perplexities(runs: Iterable[dict[str, Any]], variant: str) -> list[str]:
    values = [[run["metrics"][f"ppl/{text}/{variant}"] for run in runs] for text in _TEXTS]
    return [spread(found) for found in values]


def spread(values: list[float]) -> str:
    """Format mean ± sample standard deviation; one value, or the same in every run, has none."""
    if len(set(values)) == 1:
        return _number(values[0])
    return f"{_number(mean(values))} ± {_number(stdev(values))}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
