"""Accuracy against measured speed: every method of a model, with what its network takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.report.averaged import read_seeds
from spinlab.report.formats import Sheet
from spinlab.report.pairs import runs_of
from spinlab.report.records import texts_of
from spinlab.report.speeds import CASES, read_speeds
from spinlab.report.tables.gap import online_title, shares_closed
from spinlab.report.tables.methods import columns_of, filled, in_order, titles_of

_MEASURED = (" KL", "difference")  # how the titles of columns end that are shown


def pareto_table(folder: Path, baseline: str, *speeds: str) -> str:
    """Return a table of all methods of a folder: what runs online, accuracy, speed and memory.

    Shares of a gap are of the baseline's, in log perplexity; the difference is that of zero-shot
    accuracy from the original's. speeds: records of whole networks as `read_speeds` takes them; a
    cell is empty where none is of what a method's networks run online, and a column that would be
    empty is left out. Raises InputError where a
    record is missing.
    """
    records, titles, timed = read_seeds(folder), titles_of(folder), read_speeds(speeds)
    against = runs_of(baseline, records)
    texts = texts_of(against[0]["metrics"])
    every = [run for runs in records.values() for run in runs]
    columns = {t: make for t, make in columns_of(every).items() if t.endswith(_MEASURED)}
    cases = [case for case in CASES if any(case in timed.of(run) for run in every)]
    rows = [["method", "online", *(f"{text} gap" for text in texts), *columns, *cases]]
    original = [*("" for _ in texts), *filled(columns, every, "fp")]
    rows.append(["original", "", *original, *_measured(cases, dict.fromkeys(cases, 1.0))])
    for method in in_order(records, titles):
        runs = records[method]
        cells = [method, online_title(runs[0]), *shares_closed(runs, against, texts)]
        rows.append([*cells, *filled(columns, runs, "fake"), *_measured(cases, timed.of(runs[0]))])
    return Sheet(rows, [timed.note]).markdown()


def _measured(cases: Sequence[str], found: Mapping[str, float]) -> list[str]:
    return [f"{found[case]:.2f}" if case in found else "" for case in cases]
