"""The table of methods: every method of the field on one model, mean and spread over seeds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf

from spinlab.config.weights import method_title
from spinlab.report.averaged import asked, read_seeds
from spinlab.report.cells import OF_TEXTS
from spinlab.report.formats import MISSING, Sheet, percent, spread
from spinlab.report.records import Record, texts_of

# titles of what stands for all tasks, the metric and its error
_OF_TASKS = (
    ("zero-shot", "accuracy", "stderr"),
    ("difference", "difference", "difference_stderr"),
)


def methods_table(folder: Path) -> str:
    """Return `methods_sheet` in Markdown."""
    return methods_sheet(folder).markdown()


def methods_sheet(folder: Path) -> Sheet:
    """Return a table with one row per method of a folder of records, after the original's.

    KL per token in nats, flips in percent, and the mean of zero-shot tasks in percent with its
    difference from the original's are columns once a record has them. The errors of these two are
    those of the questions, which all seeds share, in the mean over seeds; others are spreads over
    seeds. Methods come in the order of the folder's titles, those without a title behind them.
    """
    records, titles = read_seeds(folder), titles_of(folder)
    originals = [run for runs in records.values() for run in runs]
    columns = columns_of(originals)
    head = ["method", "transform", "weights", "learned", "seeds", *columns]
    rows = [head, ["", "original", "16 bits", "", "", *filled(columns, originals, "fp")]]
    for method in in_order(records, titles):
        runs = records[method]
        config = runs[0]["config"]
        weights, learned = method_title(config["weights"]["method"]), _learned(config)
        cells = [method, titles.get(method, ""), weights, learned, str(len(runs))]
        rows.append([*cells, *filled(columns, runs, "fake")])
    return Sheet(rows)


def titles_of(folder: Path) -> dict[str, str]:
    """Return what `titles.yaml` beside records says of their methods, in its order."""
    path = folder / "titles.yaml"
    titles: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return {str(name): str(title) for name, title in titles.items()}


def in_order(records: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Return the names of records in the order of titles, those without one behind them."""
    return [*(t for t in titles if t in records), *sorted(records.keys() - titles.keys())]


def columns_of(records: Sequence[Record]) -> dict[str, Callable[..., str]]:
    """Return what makes the cells of every column that some record has numbers for, by title."""
    texts = texts_of(records[0]["metrics"])
    has = {name.rpartition("/")[0] for run in records for name in run["metrics"]}
    found: dict[str, Callable[..., str]] = {}
    for kind, (title, scale, digits) in OF_TEXTS.items():
        for text in (text for text in texts if f"{kind}/{text}" in has):
            found[f"{text} {title}"] = partial(_spread, f"{kind}/{text}", scale, digits)
    for title, name, error in _OF_TASKS:
        if f"zeroshot_mean/{name}" in has:
            found[title] = partial(_mean, f"zeroshot_mean/{name}", f"zeroshot_mean/{error}")
    return found


def filled(
    columns: Mapping[str, Callable[..., str]], runs: Sequence[Record], variant: str
) -> list[str]:
    """Return the cells of columns for a variant: what its runs have, in the mean over them.

    Seeds that were asked no questions count for texts alone.
    """
    of_questions = {title for title, *_ in _OF_TASKS}
    some = asked(runs) or runs
    return [
        make([run["metrics"] for run in (some if title in of_questions else runs)], variant)
        for title, make in columns.items()
    ]


def _spread(
    name: str, scale: float, digits: int, runs: Sequence[Mapping[str, float]], variant: str
) -> str:
    """Format mean and spread of a metric that all runs have."""
    values = [metrics.get(f"{name}/{variant}") for metrics in runs]
    found = [scale * value for value in values if value is not None]
    return spread(found, digits) if len(found) == len(values) else MISSING


def _mean(name: str, error: str, runs: Sequence[Mapping[str, float]], variant: str) -> str:
    """Format means over runs of a metric that all have, and of its standard error."""
    if not all(f"{name}/{variant}" in metrics for metrics in runs):
        return MISSING
    return percent(*(mean(metrics[f"{n}/{variant}"] for metrics in runs) for n in (name, error)))


def perplexities(runs: Sequence[Record], texts: Sequence[str], variant: str) -> list[str]:
    """Return a variant's perplexity of each text: mean and spread over runs."""
    return [spread([run["metrics"][f"ppl/{text}/{variant}"] for run in runs]) for text in texts]


def _learned(config: Mapping[str, Any]) -> str:
    """Say on how much text rotations were learned."""
    learn = config["learn"]
    if learn["steps"] == 0:
        return ""
    return f"{learn['steps']} x {learn['batch']} x {learn['sequence_length']}"
