"""Number formats by rotations and rounding: one measure of all of them in a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spinlab.errors import InputError, did_you_mean
from spinlab.report.averaged import read_seeds
from spinlab.report.cells import OF_TEXTS
from spinlab.report.formats import MISSING, Sheet
from spinlab.report.records import Record
from spinlab.report.settings import settings_of_today
from spinlab.report.tables.methods import columns_of, filled
from spinlab.report.words import format_words, gains_words, rotation_words, rounding_words

_ROUNDING = ("RTN, whole range", "RTN", "GPTQ", "GPTAQ", "Qronos")  # the first columns
_BITS = "bits/weights/fake"
_OF_TASKS = {"zeroshot_mean/accuracy": "zero-shot", "zeroshot_mean/difference": "difference"}


def formats_table(folder: Path, metric: str = "kl/wiki") -> str:
    """Return `formats_sheet` in Markdown."""
    return formats_sheet(folder, metric).markdown()


def formats_sheet(folder: Path, metric: str = "kl/wiki") -> Sheet:
    """Return a table of one measure: formats and rotations in rows, rounding in columns.

    metric: without a variant, `ppl/wiki`, `kl/c4`, `zeroshot_mean/accuracy`. Cells are mean ±
    sample standard deviation over seeds, of accuracies in percent with the standard error of the
    questions. Formats come by the bits that a number of the weights takes, scales counted. Raises
    InputError for a metric that no record has, and for two names whose settings are in words the
    same.
    """
    records = read_seeds(folder)
    every = [run for runs in records.values() for run in runs]
    title, column = _column(every, metric)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    bits: dict[str, float] = {}
    for name, runs in records.items():
        settings = settings_of_today(runs[0])
        turned = ", ".join(filter(None, (rotation_words(settings), gains_words(settings))))
        place = format_words(settings), turned
        row, rounding = cells.setdefault(place, {}), rounding_words(settings)
        if rounding in row:
            told = f"{'; '.join(place)}; {rounding}"
            raise InputError(f"{name} is a second one of `{told}`: take one of them away")
        row[rounding] = filled({title: column}, runs, "fake")[0]
        bits[place[0]] = _bits(runs[0])
    roundings = sorted({name for row in cells.values() for name in row}, key=_order)
    rows = [["format", "bits", "rotation", *roundings]]
    for place in sorted(cells, key=lambda p: (bits[p[0]], p[0], not p[1].startswith("none"), p[1])):
        found = [cells[place].get(name, "") for name in roundings]
        rows.append([place[0], f"{bits[place[0]]:.2f}", place[1], *found])
    original = filled({title: column}, every, "fp")[0]
    known = "" if original == MISSING else f"; the original's is {original}"
    return Sheet(rows, [f"{title}{known}."])


def _column(records: Sequence[Record], metric: str) -> tuple[str, Callable[..., str]]:
    """Return the title of a measure, and what makes its cells."""
    columns = columns_of(records)
    names = {name.rpartition("/")[0] for run in records for name in run["metrics"]}
    known = {name: title for name in names if (title := _title(name)) in columns}
    if metric not in known:
        raise InputError(f"no record has {metric}: {did_you_mean(metric, sorted(known))}")
    return known[metric], columns[known[metric]]


def _title(metric: str) -> str:
    """Return what columns call a measure; empty where none is of it."""
    kind, _, text = metric.partition("/")
    return f"{text} {OF_TEXTS[kind][0]}" if kind in OF_TEXTS else _OF_TASKS.get(metric, "")


def _bits(record: Record) -> float:
    if (bits := record["metrics"].get(_BITS)) is None:
        raise InputError(f"a record of {record['experiment']} has no {_BITS}: measure `fake` too")
    return bits


def _order(rounding: str) -> tuple[int, str]:
    """Sort the roundings that are known before the others."""
    known = rounding in _ROUNDING
    return (_ROUNDING.index(rounding) if known else len(_ROUNDING), rounding)
