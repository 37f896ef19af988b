"""Shares of the gap, divergence and answers of every method on every model, in one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from spinlab.files import write_json
from spinlab.report.averaged import asked, read_seeds
from spinlab.report.pairs import gap_closed, runs_of
from spinlab.report.records import Record, texts_of

_ANSWERS = "zeroshot_mean/accuracy"


def quality_summary(folder: Path, name: str, baseline: str) -> Path:
    """Write the means over seeds of a folder of models, each a folder of records, beside it.

    gap_closed/<model>/<method>/<text>, and /deviation: share of the baseline's log-perplexity gap,
                                                        of models that have the baseline
    kl/<model>/<method>/<text>: nats to the original, per token
    zeroshot/<model>/<method>/mean: accuracy, also of the method `original`
    Returns the path of the file of that name.
    """
    metrics: dict[str, float] = {}
    for place in models_in(folder):
        records = read_seeds(place)
        found = _of_model(records, baseline)
        metrics |= {key.replace("/", f"/{place.name}/", 1): value for key, value in found.items()}
    path = folder.parent / name
    write_json(path, {"schema": 1, "baseline": baseline, "metrics": metrics})
    return path


def _of_model(records: Mapping[str, list[Record]], baseline: str) -> dict[str, float]:
    against = runs_of(baseline, records) if baseline in records else []
    found: dict[str, float] = {}
    for method, runs in records.items():
        for text in texts_of(runs[0]["metrics"]):
            if against and method != baseline:
                shares = gap_closed(runs, against, text)
                found[f"gap_closed/{method}/{text}"] = mean(shares)
                if len(shares) > 1:
                    found[f"gap_closed/{method}/{text}/deviation"] = stdev(shares)
            found |= mean_over(runs, f"kl/{text}/fake", f"kl/{method}/{text}")
        found |= mean_over(asked(runs) or runs, f"{_ANSWERS}/fake", f"zeroshot/{method}/mean")
    every = against or [run for runs in records.values() for run in runs]
    return found | mean_over(asked(every) or every, f"{_ANSWERS}/fp", "zeroshot/original/mean")


def models_in(folder: Path) -> list[Path]:
    """Return the folders of models below one, in order."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def mean_over(runs: Sequence[Record], metric: str, name: str) -> dict[str, float]:
    """Return the mean of a metric that all runs have, under a name; nothing where one lacks it."""
    values = [run["metrics"].get(metric) for run in runs]
    return {name: mean(values)} if all(value is not None for value in values) else {}
