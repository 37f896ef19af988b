"""Settings of what a run leaves behind: folders, mirrors of the record, exported files."""

from dataclasses import dataclass, field

from spinlab.config.checks import choice
from spinlab.errors import InputError


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    project: str = "spinlab"
    entity: str | None = None

    def __post_init__(self) -> None:
        choice("tracker.wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass(frozen=True)
class TrackerConfig:
    """Choose the mirrors of the record; metrics.jsonl and record.json are always written."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False


@dataclass(frozen=True)
class PathsConfig:
    cache: str = ".cache/spinlab"
    runs: str = "runs"


@dataclass(frozen=True)
class SweepConfig:
    """Choose what a sweep tells of its points; it changes none of them."""

    metric: str | None = None  # a name, or a pattern of names with *; what a search optimises


@dataclass(frozen=True)
class ExportConfig:
    """Name what to write once the rotations are there; null writes nothing.

    Each field has a module of its name in `spinlab.export`.
    """

    rotations: str | None = None  # .safetensors (all of them) or .bin (R1, R2, SpinQuant's layout)
    transformed: str | None = None  # folder: the rotated checkpoint with its transform manifest

    def __post_init__(self) -> None:
        if self.rotations and not self.rotations.endswith((".safetensors", ".bin")):
            raise InputError(f"export.rotations={self.rotations} must end in .safetensors or .bin")
