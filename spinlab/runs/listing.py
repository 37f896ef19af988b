"""The list of runs: which of them, in which order, with which columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from spinlab.config.values import text
from spinlab.errors import InputError, did_you_mean
from spinlab.report.commands import words_of_command
from spinlab.report.formats import markdown, number
from spinlab.report.points import metric_names, own_of_each
from spinlab.runs.found import Run

_MOST = 6  # columns of what differs
_SHORT = 8  # digits of a key


@dataclass(frozen=True)
class Filter:
    """One condition: NAME=VALUE, with values A,B, ranges A..B (either end may be open) and a*."""

    name: str
    wanted: str

    @classmethod
    def read(cls, word: str) -> "Filter":
        """Read a word of the command line."""
        name, _, wanted = word.partition("=")
        if not name or not all(_choices(wanted)):
            raise InputError(
                f"{word!r} is no condition: write NAME=VALUE, NAME=A,B, NAME=LOW..HIGH with either "
                "end left out, or NAME='a*'"
            )
        return cls(name, wanted)

    def fits(self, run: Run) -> bool:
        """Tell whether a run has the value; one without the name has none."""
        if self.name not in run.values:
            return False
        return any(_fits(run.values[self.name], choice) for choice in _choices(self.wanted))


def chosen(runs: Sequence[Run], filters: Sequence[Filter]) -> list[Run]:
    """Return the runs that fit all conditions. Raises InputError for a name that no run has."""
    check_names(runs, [condition.name for condition in filters])
    return [run for run in runs if all(condition.fits(run) for condition in filters)]


def in_order(runs: Sequence[Run], name: str | None, reverse: bool) -> list[Run]:
    """Return runs by a value, numbers before words; those without it come last, either way."""
    if name is None:
        return list(reversed(runs)) if reverse else list(runs)
    check_names(runs, [name])
    having = sorted((r for r in runs if name in r.values), key=lambda run: _rank(run.values[name]))
    lacking = [run for run in runs if name not in run.values]
    return [*(reversed(having) if reverse else having), *lacking]


def table(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """Return a table of runs: these columns, or what their commands differ in and perplexities."""
    if columns:
        check_names(runs, columns)
        heads, own = ["key", *(name for name in columns if name != "key")], []
    else:
        words = own_of_each([words_of_command(run.record) for run in runs])
        names = dict.fromkeys(name for own in words for name in own)
        own = [name for name in names if name not in ("experiment", "sweep")]
        metrics = metric_names([run.record["metrics"] for run in runs])
        heads = ["key", "experiment", "state", *own[:_MOST], *metrics]
    rows = [heads]
    for run in runs:
        values, metrics = run.values, run.record["metrics"]
        cells = [number(metrics[n]) if n in metrics else text(values.get(n, "")) for n in heads[1:]]
        rows.append([run.record["key"][:_SHORT], *cells])
    left = ", ".join(own[_MOST:])
    return markdown(rows) + (f"\n\nThey differ in {left} too: --columns shows it." if left else "")


def check_names(runs: Sequence[Run], names: Sequence[str]) -> None:
    """Raise InputError for a name that none of the runs has."""
    known = list(dict.fromkeys(name for run in runs for name in run.values))
    for name in names:
        if runs and name not in known:
            near = did_you_mean(name, known, "show KEY")
            raise InputError(f"no run has {name!r}, a setting or a metric: {near}")


def _choices(wanted: str) -> list[str]:
    """Return the values of which a run may have any; a list is one value."""
    return [wanted] if wanted.startswith("[") else wanted.split(",")


def _fits(value: Any, wanted: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return fnmatchcase(text(value), wanted.replace("[", "[[]"))
    low, dots, high = wanted.partition("..")
    try:
        return float(low or "-inf") <= value <= float((high if dots else low) or "inf")
    except ValueError:
        return False


def _rank(value: Any) -> tuple[int, Any]:
    numeric = isinstance(value, int | float)
    return (0, value) if numeric else (1, text(value))
