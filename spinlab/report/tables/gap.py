"""How much of what quantization costs a method wins back: fractions of a log-perplexity gap."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.report.averaged import read_seeds
from spinlab.report.formats import Sheet
from spinlab.report.online import online_parts
from spinlab.report.pairs import gap_closed, runs_of
from spinlab.report.records import Record, texts_of
from spinlab.report.settings import settings_of
from spinlab.report.tables.methods import perplexities, titles_of


def gap_table(folder: Path, baseline: str, *methods: str) -> str:
    """Return `gap_sheet` in Markdown."""
    return gap_sheet(folder, baseline, *methods).markdown()


def gap_sheet(folder: Path, baseline: str, *methods: str) -> Sheet:
    """Return a table of methods: what runs online, and what each closes of a baseline's gap."""
    records, titles = read_seeds(folder), titles_of(folder)
    runs = runs_of(baseline, records)
    texts = texts_of(runs[0]["metrics"])
    of_texts = [*(f"{t} ppl" for t in texts), *(f"{t} gap" for t in texts)]
    rows = [["method", "transform", "online", *of_texts]]
    rows.append(["", "original", "", *perplexities(runs, texts, "fp"), *("" for _ in texts)])
    for method in (baseline, *methods):
        found = runs_of(method, records)
        cells = [method, titles.get(method, ""), online_title(found[0])]
        closed = shares_closed(found, runs, texts)
        rows.append([*cells, *perplexities(found, texts, "fake"), *closed])
    return Sheet(rows)


def online_title(record: Record) -> str:
    """Say what a record's network runs beside its linears."""
    return ", ".join(online_parts(settings_of(record), record["model"]["heads"])) or "nothing"


def shares_closed(
    method: Sequence[Record], baseline: Sequence[Record], texts: Sequence[str]
) -> list[str]:
    """Return what a method closes of the gap of each text, in the mean; the baseline, nothing."""
    if method is baseline:
        return ["" for _ in texts]
    return [f"{100 * mean(gap_closed(method, baseline, text)):.0f} %" for text in texts]


def gap_summary(folder: Path, name: str, baseline: str, method: str) -> Path:
    """Write what a method closes of a baseline's gap, with the records behind it.

    name: of a file, from where the folder lies. Returns its path. Raises InputError for a method of
    a single seed.
    """
    records = read_seeds(folder)
    runs = {name: runs_of(name, records) for name in (method, baseline)}
    if len(runs[method]) < 2:
        raise InputError(f"{method} has one seed, which has no deviation: run it with another")
    metrics: dict[str, float] = {}
    for text in texts_of(runs[method][0]["metrics"]):
        shares = gap_closed(runs[method], runs[baseline], text)
        metrics[f"quality/gap_closed/{text}"] = mean(shares)
        metrics[f"quality/gap_closed/{text}/deviation"] = stdev(shares)
    path = (folder.parent / name).resolve()
    if not folder.resolve().is_relative_to(path.parent):
        raise InputError(f"{path} does not lie above {folder}, whose records it names")
    place = folder.resolve().relative_to(path.parent)
    names = [
        f"{place.as_posix()}/{name}_seed{record['config']['seed']}.json"
        for name, of_method in runs.items()
        for record in of_method
    ]
    write_json(path, {"schema": 1, "method": method, "metrics": metrics, "records": names})
    return path
