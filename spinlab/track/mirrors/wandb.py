"""Weights & Biases: one run for each record, online or in a folder that can be synced later.

The files of an artifact, as which a table is kept too, lie outside of an offline run and are named
by absolute paths. An offline run must hold all that is uploaded later, maybe by another machine: it
has tables as HTML, and artifacts as files of the run with what they say of themselves beside them.
"""

import html
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from spinlab.config.outputs import LONGEST_TAG
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.track.mirrors.base import Outcome, Tracker, Values
from spinlab.track.record import Record

_PATIENCE = 15  # seconds for W&B's server to answer at the start; its own limit is 90
_LAST_PATIENCE = 600  # seconds for it to take what is left at the end; by itself it waits forever
# what is logged under a name has an axis of its own, not the count of calls
_AXES = {"learn/*": "learn/step", "evaluation/*": "evaluation/place"}


def start(record: Record) -> Tracker | None:
    """Return the mirror where the settings ask for it; InputError where W&B does not start."""
    if record.config.tracker.wandb.mode == "disabled":
        return None
    try:
        return Wandb(record)
    except Exception as error:  # no login, no network, no disk: all end here
        reason = " ".join(str(error).split())
        if "deadline exceeded" in reason or "timed out" in reason:
            reason = f"no answer in {_PATIENCE} s: {reason}"
        raise InputError(f"W&B did not start ({reason}): use tracker=offline or none") from error


class Wandb(Tracker):
    """Mirror settings, curves, what is measured, tables, figures and rotations."""

    name = "wandb"

    def __init__(self, record: Record) -> None:
        import wandb

        settings, content = record.config.tracker.wandb, record.as_json()
        self._record = record.path
        self._about = {name: content[name] for name in ("experiment", "key", "model")}
        self._measured: dict[str, Values] = {}
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or record.config.name,
            job_type="point" if record.sweep else "run",
            tags=tags(content["overrides"], settings.tags),
            mode=cast(Any, settings.mode),
            name=f"{record.config.name}-{record.key}",
            id=record.key,
            resume="allow",
            reinit="create_new",  # a run for each point of a sweep, whatever became of the last
            dir=str(record.folder),
            config=content["config"],
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_PATIENCE,
                finish_timeout=_LAST_PATIENCE,
                finish_timeout_raises=True,
            ),
        )
        for names, axis in _AXES.items():
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(names, step_metric=axis)

    def log(self, step: int, values: Values) -> None:
        curves = {f"learn/{name}": value for name, value in values.items()}
        self._run.log({"learn/step": step, **curves})

    def measured(self, place: int, variant: str, values: Values) -> None:
        self._measured[variant] = values
        found = {f"evaluation/{name}": value for name, value in values.items()}
        self._run.log({"evaluation/place": place, "evaluation/variant": variant, **found})

    def finish(self, outcome: Outcome) -> None:
        import wandb

        self._run.summary.update(dict(outcome.metrics))
        self._table("metrics", ["metric", "value"], sorted(outcome.metrics.items()))
        names = sorted({name for values in self._measured.values() for name in values})
        rows = [[v, *map(values.get, names)] for v, values in self._measured.items()]
        self._table("results", ["network", *names], rows)
        if outcome.layers:
            self._table("layers", ["layer", *outcome.layers], outcome.layer_rows)
        for path in outcome.figures:
            self._run.log({f"figures/{path.stem}": wandb.Image(str(path))})
        for path, about in outcome.artifacts.items():
            self._keep(path, {**self._about, **about})
        self._run.finish(exit_code=0 if outcome.complete else 1)
        if self._run.offline:
            self._keep_one_run(outcome.complete)

    def abandon(self) -> None:
        import wandb

        with suppress(Exception):  # what is broken; left open, it would fail again at exit
            wandb.teardown(exit_code=1)

    def _table(self, name: str, columns: list[Any], rows: Iterable[Sequence[Any]]) -> None:
        import wandb

        if self._run.offline:
            table: Any = wandb.Html(_html(columns, rows))
        else:
            table = wandb.Table(columns=columns, data=cast(Any, [list(row) for row in rows]))
        self._run.log({name: table})

    def _keep(self, path: Path, about: Mapping[str, Any]) -> None:
        import wandb

        if self._run.offline:
            folder = Path(self._run.dir)
            write_json(folder / f"{path.stem}.json", about)
            shutil.copyfile(path, folder / path.name)
            for name in (path.name, f"{path.stem}.json"):
                self._run.save(folder / name, base_path=folder, policy="end")
            return
        artifact = wandb.Artifact(
            f"{path.stem}-{self._run.id}", type="rotation", metadata=dict(about)
        )
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def _keep_one_run(self, complete: bool) -> None:
        """Leave one offline run of this id: of the record that counts, else the last."""
        mine = Path(self._run.dir).parent
        others = [f for f in mine.parent.glob(f"offline-run-*-{self._run.id}") if f != mine]
        counts = json.loads(self._record.read_text(encoding="utf-8"))["status"] == "complete"
        for folder in others if complete or not counts else [mine] * bool(others):
            shutil.rmtree(folder)


def tags(overrides: Iterable[str], more: Iterable[str] = ()) -> list[str]:
    """Return what a command chose as a whole: experiment, method, groups, seed; and more tags.

    A setting below one of these has a dot in its name and is no tag, nor is what W&B finds too
    long: both are in the run's config.
    """
    words = (word.lstrip("+~") for word in overrides)
    chosen = [word for word in words if "." not in word.partition("=")[0]]
    return [tag for tag in dict.fromkeys([*chosen, *more]) if len(tag) <= LONGEST_TAG]


def _html(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.6g}"
        return "" if value is None else html.escape(str(value))

    lines = ("<tr>" + "".join(f"<td>{cell(value)}" for value in row) for row in rows)
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    return f"<table><tr>{head}{''.join(lines)}</table>"
