"""What a benchmark has found so far: printed line by line, kept as a record after each of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spinlab.bench.timing import Timing, Work, measure
from spinlab.files import write_json
from spinlab.track.environment import environment

SCHEMA = 1


class Results:
    """Gather metrics of one run and write them to a file, if there is one, as they come."""

    def __init__(self, experiment: str, config: Mapping[str, Any], path: Path | None) -> None:
        self.metrics: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self._path = path
        self._head = {
            "schema": SCHEMA,
            "experiment": experiment,
            "environment": environment(),
            "config": dict(config),
        }

    def add(self, metrics: Mapping[str, float]) -> None:
        """Keep and print metrics."""
        self.metrics.update(metrics)
        for name, value in metrics.items():
            if not name.startswith("spread/"):
                print(f"{name:56} {value:.4g}", flush=True)
        self._save()

    def times(self, case: str, timings: Mapping[str, Timing]) -> None:
        """Keep seconds of what was timed for a case, and how well they repeat."""
        self.add({f"speed/{case}/{name}": t.seconds for name, t in timings.items()})
        self.add({f"spread/{case}/{name}": t.spread for name, t in timings.items()})
        for name, timing in timings.items():
            if not timing.graph and self._head["environment"]["gpu"]:
                self.skip(f"graph/{case}/{name}", "not capturable: the host's launches are timed")

    def measure(
        self, case: str, works: Mapping[str, Sequence[Work]], device: torch.device
    ) -> dict[str, float]:
        """Time pieces of work side by side, keep their times, and return their seconds."""
        timings = measure(works, device)
        self.times(case, timings)
        return {name: timing.seconds for name, timing in timings.items()}

    def skip(self, name: str, reason: str) -> None:
        """Say in one line why something is missing."""
        line = re.sub(r"/\S*/", "", " ".join(reason.split()))[:300]  # folders say nothing elsewhere
        self.skipped[name] = line
        print(f"{name}: skipped: {line}", flush=True)
        self._save()

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do work that other software may refuse; a failure is a result, not the end of the run."""
        try:
            work()
        except Exception as error:
            self.skip(name, f"{type(error).__name__}: {error}")

    def record(self) -> dict[str, Any]:
        """Return everything found so far."""
        return {**self._head, "metrics": dict(self.metrics), "skipped": dict(self.skipped)}

    def _save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self.record())
