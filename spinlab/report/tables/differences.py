"""What single choices change: methods against a base, seed by seed."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from spinlab.config.values import text
from spinlab.report.averaged import differing, read_seeds
from spinlab.report.formats import Sheet
from spinlab.report.pairs import log_differences, runs_of, standard_error
from spinlab.report.records import Record, texts_of
from spinlab.report.settings import settings_of
from spinlab.report.tables.methods import columns_of, filled, titles_of

_MEASURED = (" ppl", " KL")  # how the titles of columns end that are shown


def differences_table(folder: Path, base: str, *choices: str) -> str:
    """Return `differences_sheet` in Markdown."""
    return differences_sheet(folder, base, *choices).markdown()


def differences_sheet(folder: Path, base: str, *choices: str) -> Sheet:
    """Return a table of the original, a base and choices, each held against the base.

    Perplexity and KL are mean ± sample standard deviation over seeds; the difference is that of log
    perplexity, seed by seed, mean ± standard error over seeds. Settings are what the folder's title
    of a row says; without one, those that differ from the base's. Raises InputError for a name
    without records and for a seed that the base lacks.
    """
    records, titles = read_seeds(folder), titles_of(folder)
    rows = {name: runs_of(name, records) for name in (base, *choices)}
    texts = texts_of(rows[base][0]["metrics"])
    every = [run for runs in rows.values() for run in runs]
    columns = {t: make for t, make in columns_of(every).items() if t.endswith(_MEASURED)}
    head = ["method", "settings", "seeds", *columns, *(f"{t} difference" for t in texts)]
    found = [head, ["", "original", "", *filled(columns, rows[base], "fp"), *("" for _ in texts)]]
    for name, runs in rows.items():
        against = [_difference(log_differences(runs, rows[base], t)) for t in texts]
        settings = titles.get(name) or _changed(runs[0], rows[base][0])
        cells = [name, settings, str(len(runs)), *filled(columns, runs, "fake")]
        found.append([*cells, *(against if name != base else ("" for _ in texts))])
    note = (
        f"difference: log perplexity less that of {base} with the same seed, mean ± standard error "
        "over seeds; above 0 is worse."
    )
    return Sheet(found, [note])


def _changed(record: Record, base: Record) -> str:
    """Return the settings that a record does not share with the base, as a command has them."""
    own = settings_of(record)
    return " ".join(f"{name}={text(own.get(name))}" for name in differing(record, base))


def _difference(values: Sequence[float]) -> str:
    """Format mean ± standard error, with the sign; of a single seed the former alone."""
    error = standard_error(values)
    told = f"{mean(values):+.3f}"
    return told if error is None else f"{told} ± {error:.3f}"
