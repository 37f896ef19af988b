"""A sweep: a state on the disk for each of its points, and one table at the end.

    runs/sweeps/<digest>/points-<host>-<process>/<number>.json   how the points of one command go
    runs/sweeps/<digest>/sweep.json, sweep.md                    how those of the last one went

A launcher may run points in other processes. What they need to know of the sweep they inherit in
the environment, and what is to be known of them is read from files.
"""

import json
import os
import platform
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from spinlab.config.outputs import metrics_in
from spinlab.errors import did_you_mean
from spinlab.files import content_key, replacing, write_json
from spinlab.report.points import metric_names, own_of_each, points_table
from spinlab.report.records import any_record

_DIGEST, _PROCESS = "SPINLAB_SWEEP", "SPINLAB_SWEEP_PROCESS"  # conf/config.yaml reads the first
_NOT_IN_DIGEST = ("paths.", "tracker", "sweep.", "export.")
_POINTS = "points-"


@dataclass
class Point:
    """One point: its words and its state (running, done, cached, failed, interrupted, killed)."""

    number: int
    words: list[str]
    state: str = "running"
    record: str | None = None
    error: str | None = None  # one sentence
    mistake: bool = False  # which the user can mend

    def save(self, sweep: Path) -> None:
        """Write the state, for the process that started the sweep."""
        folder = points_of(sweep)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.number:05}.json", asdict(self))

    @property
    def failed(self) -> bool:
        return self.state not in ("done", "cached")

    @property
    def command(self) -> str:
        """What runs this point alone, with the settings of its preset if it has one."""
        preset = any(word.startswith("+sweep=") for word in self.words)
        return shlex.join(["spinlab", *self.words, *(["hydra.mode=RUN"] if preset else [])])


@dataclass(frozen=True)
class Sweep:
    """The sweep of this command, in the process that started it."""

    folder: Path
    words: list[str]
    metrics: list[str]  # names or patterns of the table's columns

    def end(self) -> list[Point]:
        """Write and print the table of the points that were started; return them in order."""
        folder = points_of(self.folder)
        points = [Point(**json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]
        if not points:
            return points
        for point in points:
            if point.state == "running":
                point.state, point.error = "killed", "its process ended before it did"
        rows = [asdict(p) | {"command": p.command, "metrics": _metrics(p)} for p in points]
        told = self._told(points, rows)
        write_json(self.folder / "sweep.json", {"words": self.words, "points": rows})
        with replacing(self.folder / "sweep.md") as file:
            file.write_text(told, encoding="utf-8")
        print(f"\n{told}\nsweep: {self.folder / 'sweep.md'}")
        shutil.rmtree(folder, ignore_errors=True)
        return points

    def _told(self, points: list[Point], rows: list[dict[str, Any]]) -> str:
        """Return the table, how many points are in which state, and what failed."""
        states = Counter(point.state for point in points)
        lines = [points_table(rows, self.metrics), ""]
        lines.append(", ".join(f"{count} {state}" for state, count in states.items()))
        measured = [row["metrics"] for row in rows if row["metrics"]]
        for metric in self.metrics if measured else ():
            if not metric_names(measured, [metric]):
                near = did_you_mean(metric, metric_names(measured, ["*"]), "a record")
                lines.append(f"no point measured sweep.metric={metric}: {near}")
        for point, label in zip(points, labels(points), strict=True):
            if point.failed:
                lines += ["", f"{label} {point.state}: {point.error}", f"    {point.command}"]
        return "\n".join(lines) + "\n"


class Start(Callback):
    """Name the sweep before its first point; Hydra calls this in the process that starts it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global started
        words = list(config.hydra.overrides.task)
        own = [word for word in words if not word.lstrip("+").startswith(_NOT_IN_DIGEST)]
        swept = OmegaConf.select(config, "hydra.sweeper.params")
        digest = content_key([own, OmegaConf.to_container(swept) if swept else {}])
        os.environ |= {_DIGEST: digest, _PROCESS: f"{_host()}-{os.getpid()}"}
        started = Sweep(Path(config.hydra.sweep.dir), words, metrics_in(config.sweep.metric))
        _clear(started.folder)


started: Sweep | None = None  # by this process


def points_of(sweep: Path) -> Path:
    """Return where the points of the running command keep their states."""
    return sweep / f"{_POINTS}{os.environ[_PROCESS]}"


def own_words(words: Iterable[str]) -> list[str]:
    """Return the words of a point but for what is told of all of them."""
    return [word for word in words if not word.lstrip("+").startswith("sweep.")]


def labels(points: list[Point]) -> list[str]:
    """Return the words of every point by which it differs from the others."""
    own = own_of_each([point.words for point in points])
    told = (" ".join(f"{key}={value}" for key, value in words.items()) for words in own)
    return [label or " ".join(p.words) for label, p in zip(told, points, strict=True)]


def _clear(sweep: Path) -> None:
    """Remove the states of commands that were killed, and of one of the same number.

    Those of other machines, which may share the disk, are theirs to judge.
    """
    own = f"{_POINTS}{_host()}-"
    for folder in sweep.glob(f"{own}*"):
        process = int(folder.name.removeprefix(own))
        if process == os.getpid() or not psutil.pid_exists(process):
            shutil.rmtree(folder)


def _host() -> str:
    """Return what tells this machine from others, and does not say its name."""
    return content_key(platform.node())


def _metrics(point: Point) -> dict[str, float]:
    record = any_record(Path(point.record)) if point.record else ""
    return {} if isinstance(record, str) else record["metrics"]
