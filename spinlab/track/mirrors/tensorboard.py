"""TensorBoard: event files in the folder `tensorboard` beside the record."""

from contextlib import suppress
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
    """Mirror curves, what is measured, figures, and the settings beside the final metrics."""

    name = "tensorboard"

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tracker.tensorboard=true needs tensorboard: run `make setup`"
            ) from None
        self._settings = values_of(settings)
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Values) -> None:
        self._scalars("learn", step, values)

    def measured(self, place: int, variant: str, values: Values) -> None:
        self._scalars("evaluation", place, values)

    def finish(self, outcome: Outcome) -> None:
        from matplotlib.image import imread

        for layer, *values in outcome.layer_rows:
            self._scalars("layers", int(layer), dict(zip(outcome.layers, values, strict=True)))
        for path in outcome.figures:
            self._writer.add_image(f"figures/{path.stem}", imread(path), dataformats="HWC")
        settings = {name: _plain(value) for name, value in self._settings.items()}
        self._writer.add_hparams(settings, dict(outcome.metrics), run_name=".")  # and the metrics
        self._writer.close()

    def abandon(self) -> None:
        with suppress(Exception):  # what is broken
            self._writer.close()

    def _scalars(self, group: str, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)
