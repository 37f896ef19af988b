"""Trackers: metrics.jsonl always, W&B and TensorBoard as mirrors of the record.

A mirror that cannot start is a mistake in the settings. One that fails later must not take the run
with it: it is left out from there on, and the record says so.
"""

import html
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from spinlab.errors import InputError
from spinlab.track.record import Record

log = logging.getLogger(__name__)

_PATIENCE = 15  # seconds for W&B's server to answer at the start; its own limit is 90
_LAST_PATIENCE = 600  # seconds for it to take what is left at the end; by itself it waits forever


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: its final metrics, files worth keeping, and whether it went through."""

    complete: bool
    metrics: dict[str, float] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    artifacts: list[Path] = field(default_factory=list)


class Tracker(Protocol):
    """Receive what happens during a run."""

    name: str

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step of the learning curves."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Take how the run ended, and close."""
        ...

    def abandon(self) -> None:
        """Let go of what is held, after a failure."""
        ...


class LocalTracker:
    """Write one JSON line per step to metrics.jsonl, as it happens."""

    name = "metrics.jsonl"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._started = False

    def log(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **values}, sort_keys=True)
        with self._path.open("a" if self._started else "w", encoding="utf-8") as file:
            file.write(line + "\n")
        self._started = True

    def finish(self, outcome: Outcome) -> None:
        pass

    def abandon(self) -> None:
        pass


class WandbTracker:
    """Mirror config, curves, the final table and the rotations to Weights & Biases."""

    name = "wandb"

    def __init__(self, record: Record) -> None:
        import wandb

        settings = record.config.tracker.wandb
        self._record = record.path
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=cast(Any, settings.mode),
            name=f"{record.config.name}-{record.key}",
            id=record.key,
            resume="allow",
            dir=str(record.folder),
            config=record.as_json()["config"],
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_PATIENCE,
                finish_timeout=_LAST_PATIENCE,
                finish_timeout_raises=True,
            ),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def finish(self, outcome: Outcome) -> None:
        import wandb

        self._run.summary.update(outcome.metrics)
        self._run.log({"metrics": self._table(outcome.metrics)})
        for path in outcome.figures:
            self._run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        for path in outcome.artifacts:
            self._keep(path)
        self._run.finish(exit_code=0 if outcome.complete else 1)
        if self._run.offline:
            self._keep_one_run(outcome.complete)

    # An offline run must hold all that is uploaded later, maybe by another machine. The files of an
    # artifact, as which a Table is kept too, lie elsewhere and are named by absolute paths.

    def _table(self, metrics: dict[str, float]) -> Any:
        import wandb

        if not self._run.offline:
            rows: Any = [[name, value] for name, value in sorted(metrics.items())]
            return wandb.Table(columns=["metric", "value"], data=rows)
        rows = (f"<tr><td>{html.escape(k)}<td>{v:.6g}" for k, v in sorted(metrics.items()))
        return wandb.Html(f"<table>{''.join(rows)}</table>")

    def _keep(self, path: Path) -> None:
        import wandb

        if self._run.offline:
            copy = shutil.copyfile(path, Path(self._run.dir) / path.name)
            self._run.save(copy, base_path=self._run.dir, policy="end")
            return
        artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type="rotation")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def _keep_one_run(self, complete: bool) -> None:
        """Leave one offline run of this id: of the record that counts, else the last."""
        mine = Path(self._run.dir).parent
        others = [f for f in mine.parent.glob(f"offline-run-*-{self._run.id}") if f != mine]
        counts = json.loads(self._record.read_text(encoding="utf-8"))["status"] == "complete"
        for folder in others if complete or not counts else [mine] * bool(others):
            shutil.rmtree(folder)

    def abandon(self) -> None:
        import wandb

        with suppress(Exception):  # what is broken; left open, it would fail again at exit
            wandb.teardown(exit_code=1)


class TensorboardTracker:
    """Mirror curves and final metrics to TensorBoard event files."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tracker.tensorboard=true needs tensorboard: run `make setup`"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, outcome: Outcome) -> None:
        for name, value in outcome.metrics.items():
            self._writer.add_scalar(name, value)
        self._writer.close()

    def abandon(self) -> None:
        with suppress(Exception):  # what is broken
            self._writer.close()


class Trackers:
    """All trackers of a run; one that fails is left out from there on.

    `stopped` maps the names of those to when and why, and is the record's `mirrors`.
    """

    def __init__(self) -> None:
        self.stopped: dict[str, str] = {}
        self._going: list[Tracker] = []

    def start(self, record: Record) -> None:
        """Start every tracker that a record's settings ask for; the local one comes first."""
        settings = record.config.tracker
        self._going.append(LocalTracker(record.folder))
        if settings.tensorboard:
            self._going.append(TensorboardTracker(record.folder))
        if settings.wandb.mode != "disabled":
            self._going.append(_wandb(record))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand one step of the learning curves to all."""
        self._each(lambda tracker: tracker.log(step, values), f"stopped at step {step}")

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


def _wandb(record: Record) -> WandbTracker:
    try:
        return WandbTracker(record)
    except Exception as error:  # no login, no network, no disk: all end here
        reason = " ".join(str(error).split())
        if "deadline exceeded" in reason or "timed out" in reason:
            reason = f"no answer in {_PATIENCE} s: {reason}"
        raise InputError(f"W&B did not start ({reason}): use tracker=offline or none") from error
