"""CSV beside the record, for spreadsheets: curves.csv, metrics.csv and layers.csv."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spinlab.track.mirrors.base import Outcome, Tracker, Values
from spinlab.track.record import Record


def start(record: Record) -> Tracker | None:
    """Return the mirror where the settings ask for it."""
    return Csv(record.folder) if record.config.tracker.csv else None


class Csv(Tracker):
    """Write the curves as they come, and at the end a row for each metric and each layer."""

    name = "csv"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns: list[str] = []
        for name in ("curves", "metrics", "layers"):  # of an earlier run of this record
            (folder / f"{name}.csv").unlink(missing_ok=True)

    def log(self, step: int, values: Values) -> None:
        row = {"step": step, **values}
        with (self._folder / "curves.csv").open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns or list(row))
            if not self._columns:
                writer.writeheader()
                self._columns = list(row)
            writer.writerow(row)

    def finish(self, outcome: Outcome) -> None:
        self._write("metrics", ["metric", "value"], sorted(outcome.metrics.items()))
        if outcome.layers:
            self._write("layers", ["layer", *outcome.layers], outcome.layer_rows)

    def _write(self, name: str, columns: list[str], rows: Iterable[Sequence[Any]]) -> None:
        path = self._folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
