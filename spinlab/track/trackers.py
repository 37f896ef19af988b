"""Trackers: metrics.jsonl always, W&B and TensorBoard as mirrors.

A mirror that cannot start is a mistake in the settings; one that fails later must not take a
finished run with it (`finish_all`).
"""

import json
import logging
from pathlib import Path
from typing import Any, Protocol, cast

from spinlab.config import Config, plain
from spinlab.errors import InputError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receive what happens during a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step of the learning curves."""
        ...

    def finish(self, metrics: dict[str, float], figures: list[Path], artifacts: list[Path]) -> None:
        """Take the final metrics, and files worth keeping, and close."""
        ...


class LocalTracker:
    """Write one JSON line per step to metrics.jsonl, as it happens."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._started = False

    def log(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **values}, sort_keys=True)
        with self._path.open("a" if self._started else "w", encoding="utf-8") as file:
            file.write(line + "\n")
        self._started = True

    def finish(self, metrics: dict[str, float], figures: list[Path], artifacts: list[Path]) -> None:
        pass


class WandbTracker:
    """Mirror config, curves, the final table and the rotations to Weights & Biases."""

    def __init__(self, config: Config, key: str, folder: Path) -> None:
        import wandb

        settings = plain(config)
        del settings["paths"]
        self._run = wandb.init(
            project=config.tracker.wandb.project,
            entity=config.tracker.wandb.entity,
            mode=cast(Any, config.tracker.wandb.mode),
            name=f"{config.name}-{key}",
            id=key,
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def finish(self, metrics: dict[str, float], figures: list[Path], artifacts: list[Path]) -> None:
        import wandb

        self._run.summary.update(metrics)
        rows: Any = [[name, value] for name, value in sorted(metrics.items())]
        self._run.log({"metrics": wandb.Table(columns=["metric", "value"], data=rows)})
        for path in figures:
            self._run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        for path in artifacts:
            artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type="rotation")
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._run.finish()


class TensorboardTracker:
    """Mirror curves and final metrics to TensorBoard event files."""

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

    def finish(self, metrics: dict[str, float], figures: list[Path], artifacts: list[Path]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value)
        self._writer.close()


def finish_all(
    trackers: list[Tracker], metrics: dict[str, float], figures: list[Path], artifacts: list[Path]
) -> None:
    """Close every tracker; a mirror that fails is reported and the others go on."""
    for tracker in trackers:
        try:
            tracker.finish(metrics, figures, artifacts)
        except Exception as error:  # whatever a service may raise: the record is already safe
            log.warning("%s could not finish: %s", type(tracker).__name__, error)


def make_trackers(config: Config, key: str, folder: Path) -> list[Tracker]:
    """Start every tracker the config asks for; the local one comes first."""
    trackers: list[Tracker] = [LocalTracker(folder)]
    if config.tracker.tensorboard:
        trackers.append(TensorboardTracker(folder))
    if config.tracker.wandb.mode != "disabled":
        try:
            trackers.append(WandbTracker(config, key, folder))
        except Exception as error:  # no login, no network, no disk: all end here
            raise InputError(f"W&B did not start ({error}): use tracker=offline or none") from error
    return trackers
