"""TensorBoard: event files in the folder `tensorboard` beside the record."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from spinlab.config.values import values_of
from spinlab.errors import InputError
from spinlab.track.mirrors.base import Outcome, Tracker, Values
from spinlab.track.record import Record


def start(record: Record) -> Tracker | None:
    """Return the mirror where the settings ask for it."""
    if not record.config.tracker.tensorboard:
        return None
    return Tensorboard(record.folder / "tensorboard", record.as_json()["config"])


class Tensorboard(Tracker):
    """Mirror curves, what is measured, figures, and the settings beside the final metrics.

    Events are written as they come, not by a thread behind the run: what cannot be written is known
    at that very call.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            from tensorboard.compat import tf
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise InputError(
                "tracker.tensorboard=true needs tensorboard: run `make setup`"
            ) from None
        self._settings = values_of(settings)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        tf.io.gfile.makedirs(str(folder))
        self._file = RecordWriter(tf.io.gfile.GFile(str(folder / name), "wb"))
        self._write(file_version="brain.Event:2")  # every reader asks for this line first

    def log(self, step: int, values: Values) -> None:
        self._scalars("learn/", step, values)

    def measured(self, place: int, variant: str, values: Values) -> None:
        self._scalars("evaluation/", place, values)

    def finish(self, outcome: Outcome) -> None:
        from matplotlib.image import imread
        from torch.utils.tensorboard.summary import hparams, image

        for layer, *values in outcome.layer_rows:
            self._scalars("layers/", int(layer), dict(zip(outcome.layers, values, strict=True)))
        for path in outcome.figures:
            self._write(summary=image(f"figures/{path.stem}", imread(path), dataformats="HWC"))
        settings = {name: _plain(value) for name, value in self._settings.items()}
        for summary in hparams(settings, dict(outcome.metrics)):
            self._write(summary=summary)
        self._scalars("", 0, outcome.metrics)
        self._file.close()

    def _scalars(self, group: str, step: int, values: Values) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(summary=scalar(group + name, value), step=step)

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._file.write(Event(wall_time=time.time(), **event).SerializeToString())


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)
