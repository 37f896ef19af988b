"""Tables of one setting at a time: optimizers and objectives of rotation learning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from spinlab.report.methods import read_complete, spread
from spinlab.report.table import markdown

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def read_ablation(folder: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records `<kind>_<value>_seed<N>.json` of a folder by value."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{kind}_*_seed*.json")):
        value = path.stem.removeprefix(f"{kind}_").rpartition("_seed")[0]
        found.setdefault(value, []).append(read_complete(path))
    return found


def ablation_table(kind: str, records: Records) -> str:
    """Return a Markdown table with one row per value, the best on the second text first."""
    header = [kind, "lr", "lr of R2", "seeds", "wiki ppl", "c4 ppl", "seconds"]
    rows = sorted(records.items(), key=lambda item: _c4(item[1]))
    return markdown([header, *(_row(value, runs) for value, runs in rows)])


def _c4(runs: Sequence[Mapping[str, Any]]) -> float:
    return mean(run["metrics"]["ppl/c4/fake"] for run in runs)


def _row(value: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    learn = runs[0]["config"]["learn"]
    perplexities = [[run["metrics"][f"ppl/{t}/fake"] for run in runs] for t in ("wiki", "c4")]
    stages = [s for run in runs for s in run["stages"] if s["name"] == "learn"]
    learned = learn["steps"] > 0
    return [
        value,
        f"{learn['lr']:g}" if learned else "",
        f"{learn['lr_r2']:g}" if learned and learn["lr_r2"] else "",
        str(len(runs)),
        *(spread(values) for values in perplexities),
        f"{mean(s['seconds'] for s in stages):.0f}" if stages else "",
    ]
