"""How much of what quantization costs a method wins back: fractions of a log-perplexity gap."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spinlab.files import write_json
from spinlab.report.methods import read_records

TEXTS = ("wiki", "c4")


def gap_closed(
    method: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], text: str
) -> list[float]:
    """Return, seed by seed, the share of the way from the baseline to the original.

    (log b - log m) / (log b - log o), for perplexities of the baseline, the method and the
    original on a text. Records are paired by seed.
    """
    found = []
    of_seed = {record["config"]["seed"]: record for record in baseline}
    for record in method:
        other = of_seed[record["config"]["seed"]]
        ours, theirs = (math.log(r["metrics"][f"ppl/{text}/fake"]) for r in (record, other))
        original = math.log(record["metrics"][f"ppl/{text}/fp"])
        found.append((theirs - ours) / (theirs - original))
    return found


def summarize_best(experiments: Path, method: str = "learned_inputs") -> dict[str, Any]:
    """Write best_smollm2.json: what the best method closes, with the records behind it."""
    records = read_records(experiments / "methods_smollm2")
    metrics: dict[str, float] = {}
    for text in TEXTS:
        shares = gap_closed(records[method], records["quarot"], text)
        metrics[f"quality/gap_closed/{text}"] = mean(shares)
        metrics[f"quality/gap_closed/{text}/deviation"] = stdev(shares)
    names = [
        f"methods_smollm2/{name}_seed{record['config']['seed']}.json"
        for name in (method, "quarot")
        for record in records[name]
    ]
    summary = {"schema": 1, "method": method, "metrics": metrics, "records": names}
    write_json(experiments / "best_smollm2.json", summary)
    return summary
