"""What a run tells: its learning curves, what it measures, and how it ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: its final metrics, files worth keeping, and whether it went through.

    layers: name -> a number for each layer. figures: PNG files. artifacts: file -> what it says of
    itself, JSON-ready.
    """

    complete: bool
    metrics: Values = field(default_factory=dict)
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    figures: Sequence[Path] = ()
    artifacts: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def layer_rows(self) -> list[tuple[float, ...]]:
        """The numbers of `layers`, a row for each layer, behind its index."""
        return [(i, *row) for i, row in enumerate(zip(*self.layers.values(), strict=True))]


class Tracker:
    """Receive what happens during a run; what a tracker has no place for does nothing."""

    name: str

    def log(self, step: int, values: Values) -> None:
        """Take one step of the learning curves."""

    def measured(self, place: int, variant: str, values: Values) -> None:
        """Take what was measured of a variant, the `place`-th; names are without the variant."""

    def finish(self, outcome: Outcome) -> None:
        """Take how the run ended, and close."""

    def abandon(self) -> None:
        """Let go of what is held, after a failure."""
