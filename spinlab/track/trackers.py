"""Trackers: metrics.jsonl always, and the mirrors of the record that the settings ask for.

A mirror that cannot start is a mistake in the settings. One that fails later must not take the run
with it: it is left out from there on, and the record says so.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from spinlab.track.mirrors.base import Outcome, Tracker, Values
from spinlab.track.record import Record

log = logging.getLogger(__name__)


class LocalTracker(Tracker):
    """Write one JSON line per step to metrics.jsonl, as it happens."""

    name = "metrics.jsonl"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._started = False

    def log(self, step: int, values: Values) -> None:
        line = json.dumps({"step": step, **values}, sort_keys=True)
        with self._path.open("a" if self._started else "w", encoding="utf-8") as file:
            file.write(line + "\n")
        self._started = True


class Trackers:
    """All trackers of a run; one that fails is left out from there on.

    `stopped` maps the names of those to when and why, and is the record's `mirrors`.
    """

    def __init__(self) -> None:
        self.stopped: dict[str, str] = {}
        self._going: list[Tracker] = []
        self._places = 0  # variants measured so far

    def start(self, record: Record) -> None:
        """Start every tracker that a record's settings ask for; the local one comes first."""
        self._going.append(LocalTracker(record.folder))
        for field in fields(record.config.tracker):
            module = import_module(f"spinlab.track.mirrors.{field.name}")
            if mirror := module.start(record):
                self._going.append(mirror)

    def log(self, step: int, values: Values) -> None:
        """Hand one step of the learning curves to all."""
        self._each(lambda tracker: tracker.log(step, values), f"stopped at step {step}")

    def measured(self, variant: str, metrics: Values) -> None:
        """Hand what was measured of a variant to all, under names that variants share."""
        place, end = self._places, f"/{variant}"
        self._places += 1
        found = {name.removesuffix(end): value for name, value in metrics.items()}
        self._each(lambda tracker: tracker.measured(place, variant, found), f"stopped at {variant}")

    def finish(self, outcome: Outcome) -> None:
        """Close all of them."""
        self._each(lambda tracker: tracker.finish(outcome), "could not finish")

    def _each(self, act: Callable[[Tracker], None], failed: str) -> None:
        for tracker in list(self._going):
            try:
                act(tracker)
            except Exception as error:  # whatever a service may raise: the run is worth more
                self._going.remove(tracker)
                self.stopped[tracker.name] = f"{failed}: {type(error).__name__}: {error}"
                log.warning("%s %s", tracker.name, self.stopped[tracker.name])
                tracker.abandon()
