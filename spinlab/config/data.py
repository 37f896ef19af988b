"""Settings of the texts."""

from dataclasses import dataclass, field

from spinlab.config.checks import filled


@dataclass(frozen=True)
class DataConfig:
    """Name the texts: wiki, c4 (packaged), wikitext2 (hub), or the path of a file.

    A file is plain text, or .json, .jsonl, .parquet with a field `text`. It is used whole, unless
    it both calibrates and is evaluated: then the first 90 % calibrate, the rest is evaluated.
    """

    calibration: str = "wiki"
    evaluation: list[str] = field(default_factory=lambda: ["wiki", "c4"])

    def __post_init__(self) -> None:
        filled("data.evaluation", self.evaluation)
