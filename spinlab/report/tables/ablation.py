"""Tables of one setting at a time: optimizers and objectives of rotation learning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from spinlab.report.averaged import read_seeds
from spinlab.report.formats import markdown
from spinlab.report.records import Record, texts_of
from spinlab.report.tables.methods import perplexities


def ablation_table(folder: Path, kind: str) -> str:
    """Return a table of the records `<kind>_<value>_seed<N>.json`, one row per value.

    The best on the last text, which learning has not seen, comes first.
    """
    records = read_seeds(folder, f"{kind}_")
    texts = texts_of(next(iter(records.values()))[0]["metrics"])
    held_out = f"ppl/{texts[-1]}/fake"
    head = [kind, "lr", "lr of R2", "seeds", *(f"{text} ppl" for text in texts), "seconds"]
    order = sorted(records, key=lambda v: mean(run["metrics"][held_out] for run in records[v]))
    return markdown([head, *(_row(value, records[value], texts) for value in order)])


def _row(value: str, runs: Sequence[Record], texts: Sequence[str]) -> list[str]:
    learn = runs[0]["config"]["learn"]
    stages = [s for run in runs for s in run["stages"] if s["name"] == "learn"]
    rates = _rates(learn) if learn["steps"] else (None, None)
    return [
        value,
        *("" if rate is None else f"{rate:g}" for rate in rates),
        str(len(runs)),
        *perplexities(runs, texts, "fake"),
        f"{mean(s['seconds'] for s in stages):.0f}" if stages else "",
    ]


def _rates(learn: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return the rates of R1 and R2; they had no part of their own in the first records."""
    rates = learn["lr"]
    return (rates["r1"], rates["r2"]) if isinstance(rates, dict) else (rates, learn["lr_r2"])
