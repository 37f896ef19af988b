"""The table of one record: what each variant of the network costs and scores."""

from pathlib import Path

from spinlab.config import VARIANTS
from spinlab.report.cells import cells_of
from spinlab.report.formats import MISSING, markdown
from spinlab.report.records import Record, read_record

_TITLES = {
    "fp": "original",
    "rtn": "no rotation",
    "init": "before learning",
    "fake": "the method, emulated in floats",
    "integer": "the method, on integer kernels",
}


def record_table(path: Path) -> str:
    """Return the table of a record's file."""
    return result_table(read_record(path))


def result_table(record: Record) -> str:
    """Return a Markdown table of `cells_of` with one row per variant that was measured."""
    rows: list[list[str]] = []
    for variant in VARIANTS:
        cells = cells_of(record, variant)
        rows = rows or [["variant", "network", *cells]]
        if set(cells.values()) != {MISSING}:
            rows.append([variant, _TITLES[variant], *cells.values()])
    return markdown(rows)
