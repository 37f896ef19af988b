"""A published table: ours beside the paper's, how far apart they may be, a verdict, the command."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from spinlab.errors import InputError
from spinlab.report.averaged import seeds_of
from spinlab.report.formats import Sheet, spread
from spinlab.report.publications import Measure, Row, Table, Tolerance, table_named
from spinlab.report.records import Records, read_below
from spinlab.report.rows import (
    command,
    differences,
    has_preset,
    is_near,
    is_of_model,
    row_config,
    value_of,
)

MARK = "†"  # of every number that is a paper's
HEAD = (
    *("model", "bits", "method", "measure", "ours", "seeds", f"paper {MARK}", "difference"),
    *("tolerance", "verdict", "note", "command"),
)
_VERDICTS = ("within", "outside")
_NEAR = 2  # records that are named where none may be compared


@dataclass(frozen=True)
class _Ours:
    """What our records say of one published value."""

    values: Sequence[float] = ()
    verdict: str = "not run"
    note: str = ""


def paper_table(folder: Path, name: str, *models: str) -> str:
    """Return a published table in Markdown, of all its models or of some, for a page."""
    return paper_sheet([folder], name, models).markdown()


def paper_sheet(folders: Sequence[Path], name: str, models: Sequence[str] = ()) -> Sheet:
    """Return a published table with our records below folders; one line for every value.

    Raises InputError for a table or a model that is not there.
    """
    paper, table = table_named(name)
    for model in models:
        if model not in table.models:
            raise InputError(f"{name} has no model {model!r}: it has {', '.join(table.models)}")
    found = read_below(*folders)
    rows = [
        line
        for model in (models or table.models)
        for row in table.rows
        if model in row.values
        for line in _lines(table, row, model, found)
    ]
    notes = [f"{MARK} {paper.title}, arXiv {paper.arxiv}. {table.title}; {table.read}."]
    return Sheet((HEAD, *rows), (*notes, *_reasons(table), *([found.note] if found.note else ())))


def _lines(table: Table, row: Row, model: str, found: Records) -> list[tuple[str, ...]]:
    """Return the lines of a row for a model, one for each measure that has a value."""
    lines = []
    for at, (name, measure) in enumerate(table.measures.items()):
        theirs = row.values[model][at]
        if theirs is None:
            continue
        tolerance = row.tolerance.get(name, measure.tolerance)
        ours = _judged(_ours(table, row, model, measure, found), measure, tolerance, theirs)
        compared = ours.verdict in _VERDICTS
        lines.append(
            (
                *(model, row.bits, row.method, measure.title),
                *((spread(ours.values), str(len(ours.values))) if ours.values else ("", "")),
                f"{_digits(table, at, theirs)} {MARK}",
                f"{mean(ours.values) - theirs:+.2f}" if compared else "",
                _within(measure, tolerance) if row.ours else "",
                ours.verdict,
                "; ".join(part for part in (row.read, ours.note, row.why) if part),
                command(table, row, model),
            )
        )
    return lines


def _judged(ours: _Ours, measure: Measure, tolerance: Tolerance | None, theirs: float) -> _Ours:
    """Give the verdict on values that may be compared."""
    if not ours.values or measure.unlike or tolerance is None:
        return ours
    holds = tolerance.holds(measure.metric, mean(ours.values), theirs)
    return replace(ours, verdict=_VERDICTS[not holds])


def _digits(table: Table, at: int, value: float) -> str:
    """Format a paper's value with the digits that its column has."""
    column = [v[at] for row in table.rows for v in row.values.values()]
    places = max(len(f"{v:g}".partition(".")[2]) for v in column if v is not None)
    return f"{value:.{places}f}" if abs(value) < 100 else f"{value:g}"


def _within(measure: Measure, tolerance: Tolerance | None) -> str:
    if tolerance is None or measure.unlike:
        return ""
    if not measure.metric.startswith("ppl/"):
        return f"{tolerance.within:g} points"
    factor = 1 + tolerance.within
    return f"{100 * tolerance.within:g} %" if factor < 2 else f"{factor:g}-fold"


def _reasons(table: Table) -> list[str]:
    """Say once why each tolerance is what it is, and why a measure is not compared."""
    told = {}
    for name, measure in table.measures.items():
        if measure.unlike:
            told[f"{measure.title} is not compared: {measure.unlike}."] = None
            continue
        for tolerance in (measure.tolerance, *(row.tolerance.get(name) for row in table.rows)):
            if tolerance:
                told[f"{_within(measure, tolerance)} ({measure.title}): {tolerance.why}."] = None
    return list(told)


def _ours(table: Table, row: Row, model: str, measure: Measure, found: Records) -> _Ours:
    """Return what our records have for a row's measure, or why they have nothing."""
    if not row.ours:
        return _Ours(verdict="published only")
    if not has_preset(model):
        return _Ours(note=f"conf/model has no {model}")
    config = row_config(table, row, model)
    of_model = {path: r for path, r in found.kept.items() if is_of_model(r, config)}
    judged = {path: differences(r, config, row, measure) for path, r in of_model.items()}
    numbers = {
        path: value_of(of_model[path], config, row, measure)
        for path, unlike in judged.items()
        if not unlike
    }
    chosen, left = seeds_of({p: of_model[p] for p, value in numbers.items() if value is not None})
    values = [value for path, value in numbers.items() if path in chosen and value is not None]
    told = [f"{_name(path)} is left out, {reason}" for path, reason in left.items()]
    if values:
        verdict = "not compared" if measure.unlike else "no tolerance"
        return _Ours(values, verdict, "; ".join(told))
    near = [(path, unlike) for path, unlike in judged.items() if unlike and is_near(unlike)]
    if not near or row.variant == "fp":
        return _Ours()
    told = [f"{_name(path)} has {', '.join(unlike)}" for path, unlike in near[:_NEAR]]
    more = [f"and {len(near) - _NEAR} more"] if len(near) > _NEAR else []
    return _Ours(verdict="not compared", note="; ".join((*told, *more)))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
