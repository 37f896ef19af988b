"""Published numbers, read from `published/<paper>.yaml`: what was read, where, and how it was made.

A paper has tables, a table has measures, which are its columns, and rows, which hold for every
model the values in the order of the measures. A row names the words that, after
`+experiment=paper model=<model>`, make ours of it, or says why there are none. Its protocol is
what was read of the paper's, in the names of our settings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from yaml import YAMLError

from spinlab.errors import InputError, did_you_mean

PUBLISHED = Path(__file__).parent / "published"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Tolerance:
    """How far two honest runs of one protocol may lie apart, and why.

    Of a perplexity the share by which one exceeds the other, of an accuracy points.
    """

    within: float
    why: str

    def holds(self, metric: str, ours: float, theirs: float) -> bool:
        """Tell whether ours agrees with a published value."""
        if metric.startswith("ppl/"):
            return max(ours, theirs) <= (1 + self.within) * min(ours, theirs)
        return abs(ours - theirs) <= self.within


@dataclass(frozen=True)
class Measure:
    """A column: the metric of our records, or why none of ours may stand beside it."""

    title: str
    metric: str  # `ppl/<text>`, or `zeroshot`: the mean in percent over the tasks of the settings
    unlike: str = ""
    tolerance: Tolerance | None = None


@dataclass(frozen=True)
class Row:
    """A method at certain bits: what a paper has of it, by model."""

    method: str
    bits: str  # weights-activations-keys and values
    values: Mapping[str, tuple[float | None, ...]]  # model -> values, as the table's measures go
    ours: tuple[str, ...] = ()  # words of our command
    why: str = ""  # why there are no such words, or what is not sure about them
    variant: str = "fake"  # which network of our run the row is about
    read: str = ""  # where, if not where its table was read
    protocol: Mapping[str, Any] = field(default_factory=dict)  # beside its table's
    tolerance: Mapping[str, Tolerance] = field(default_factory=dict)  # of measures, by name


@dataclass(frozen=True)
class Table:
    """A table of a paper, or of what others measured under its protocol."""

    title: str
    read: str  # which text of it, and where
    measures: Mapping[str, Measure]
    rows: tuple[Row, ...]
    ours: tuple[str, ...] = ()  # words of every row's command, before its own
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models of all rows, in the order in which they come."""
        return list(dict.fromkeys(model for row in self.rows for model in row.values))


@dataclass(frozen=True)
class Paper:
    """A publication, and those of its tables that were read."""

    title: str
    arxiv: str
    tables: Mapping[str, Table]


@cache
def papers() -> Mapping[str, Paper]:
    """Return all papers by the name of their file. Raises InputError for a broken file."""
    return {path.stem: read_paper(path) for path in sorted(PUBLISHED.glob("*.yaml"))}


def table_named(name: str) -> tuple[Paper, Table]:
    """Return a published table and its paper; raise InputError with the nearest names."""
    for paper in papers().values():
        if name in paper.tables:
            return paper, paper.tables[name]
    known = [table for paper in papers().values() for table in paper.tables]
    near = did_you_mean(name, known, "spinlab/report/published")
    raise InputError(f"unknown table {name!r}: {near}")


def read_paper(path: Path) -> Paper:
    """Return a file's paper; raise InputError for what is unknown in it, or missing."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    tables = {name: _table(t, place) for name, t, place in _each(content, "tables", path.name)}
    return _made(Paper, content, path.name, tables=tables)


def _table(given: Any, place: str) -> Table:
    measures = {name: _measure(m, where) for name, m, where in _each(given, "measures", place)}
    rows = [
        _row(row, measures, f"{place}.rows[{at}]") for at, row in enumerate(given.get("rows", ()))
    ]
    made = _made(Table, given, place, measures=measures, rows=tuple(rows))
    if len({(row.method, row.bits, row.read) for row in rows}) < len(rows):
        raise InputError(f"{place}: two rows have one method, bits and source")
    return made


def _measure(given: Any, place: str) -> Measure:
    tolerance = given.get("tolerance")
    made = tolerance and _made(Tolerance, tolerance, f"{place}.tolerance")
    return _made(Measure, given, place, tolerance=made)


def _row(given: Any, measures: Mapping[str, Measure], place: str) -> Row:
    tolerances = {
        name: _made(Tolerance, t, where) for name, t, where in _each(given, "tolerance", place)
    }
    values = {model: tuple(v) for model, v, _ in _each(given, "values", place)}
    for model, numbers in values.items():
        if len(numbers) != len(measures):
            raise InputError(f"{place}.values.{model} has {len(numbers)} of {len(measures)} values")
    made = _made(Row, given, place, tolerance=tolerances, values=values)
    if not made.ours and not made.why:
        raise InputError(f"{place} needs `ours`, the words of our command, or `why` there are none")
    if unknown := tolerances.keys() - measures.keys():
        raise InputError(f"{place}.tolerance: no measure is named {', '.join(sorted(unknown))}")
    return made


def _each(given: Any, name: str, place: str) -> Iterator[tuple[str, Any, str]]:
    """Yield the entries of a mapping in a mapping, with their places."""
    part = (given.get(name) if isinstance(given, dict) else None) or {}
    if not isinstance(part, dict):
        raise InputError(f"{place}.{name} is no mapping")
    for key, value in part.items():
        yield str(key), value, f"{place}.{name}.{key}"


def _made(kind: type[_T], given: Any, place: str, **nested: Any) -> _T:
    """Make a dataclass of a mapping; raise InputError for an entry too many or too few."""
    if not isinstance(given, dict):
        raise InputError(f"{place} is no mapping")
    known = {f.name: f for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in given.keys() - known.keys():
        raise InputError(f"{place} has an unknown entry {name!r}: {did_you_mean(name, [*known])}")
    for name, one in known.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise InputError(f"{place} has no {name!r}")
    content = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return kind(**{**content, **{k: v for k, v in nested.items() if k in given}})
