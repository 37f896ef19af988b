"""Settings of what a run leaves behind: folders, mirrors of the record, exported files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spinlab.config.checks import choice
from spinlab.errors import InputError

PROFILES = (
    *("vllm_w4a8", "vllm_w4a4", "weights_only"),
    *("mxfp4", "mxfp4_weights", "nvfp4", "nvfp4_weights"),
)
LONGEST_TAG = 64  # characters that W&B takes


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    project: str = "spinlab"
    entity: str | None = None
    group: str | None = None  # the experiment's name
    tags: list[str] = field(default_factory=list)  # beside what the command chose

    def __post_init__(self) -> None:
        choice("tracker.wandb.mode", self.mode, ("online", "offline", "disabled"))
        if long := [tag for tag in self.tags if len(tag) > LONGEST_TAG]:
            raise InputError(
                f"tracker.wandb.tags: {long[0]!r} has {len(long[0])} characters, and W&B takes "
                f"{LONGEST_TAG}: shorten it"
            )


@dataclass(frozen=True)
class TrackerConfig:
    """Choose the mirrors of the record; metrics.jsonl and record.json are always written.

    Each field has a module of its name in `spinlab.track.mirrors`.
    """

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    csv: bool = False


@dataclass(frozen=True)
class PathsConfig:
    cache: str = ".cache/spinlab"
    runs: str = "runs"


@dataclass(frozen=True)
class SweepConfig:
    """Choose what a sweep tells of its points; it changes none of them."""

    # of the table's columns a name or a pattern of names with *, or a list of them; of a search the
    # one name that it optimises
    metric: Any = None

    @property
    def metrics(self) -> list[str]:
        return metrics_in(self.metric)

    def __post_init__(self) -> None:
        metrics_in(self.metric)


def metrics_in(metric: Any) -> list[str]:
    """Return the names and patterns of `sweep.metric`, whether it is a list or a single one.

    Raises InputError for what is no name.
    """
    several = isinstance(metric, Sequence) and not isinstance(metric, str)
    found: list[Any] = list(metric) if several else [] if metric is None else [metric]
    for name in found:
        if not isinstance(name, str):
            raise InputError(f"sweep.metric={name} is no name of a metric: use ppl/wiki/fake")
    return found


@dataclass(frozen=True)
class ExportConfig:
    """Name what to write at the end of a run; null writes nothing.

    Each of `targets` has a module of its name in `spinlab.export`.
    """

    rotations: str | None = None  # .safetensors (all of them) or .bin (R1, R2, SpinQuant's layout)
    transformed: str | None = None  # folder: the rotated checkpoint with its transform manifest
    artefact: str | None = None  # folder: the quantized network, for spinlab.load
    checkpoint: str | None = None  # folder: the rotated model in 16 bits, for any other tool
    compressed_tensors: str | None = None  # folder: the quantized network for vLLM, transformers
    profile: str = "vllm_w4a8"  # of compressed_tensors, one of PROFILES
    gguf: str | None = None  # file: the rotated model for llama.cpp
    gguf_type: str = "f16"  # of its linears: also q4_0, q8_0

    @property
    def targets(self) -> dict[str, str]:
        """What is asked for: its place by the name of its field."""
        options = ("profile", "gguf_type")
        return {name: path for name, path in vars(self).items() if path and name not in options}

    @property
    def rounded(self) -> bool:
        """Tell whether anything that is asked for holds rounded weights."""
        blocks = self.gguf is not None and self.gguf_type != "f16"
        return bool(self.artefact or self.compressed_tensors or blocks)

    def __post_init__(self) -> None:
        choice("export.profile", self.profile, PROFILES)
        choice("export.gguf_type", self.gguf_type, ("f16", "q4_0", "q8_0"))
        if self.rotations and not self.rotations.endswith((".safetensors", ".bin")):
            raise InputError(f"export.rotations={self.rotations} must end in .safetensors or .bin")
        if self.gguf and not self.gguf.endswith(".gguf"):
            raise InputError(f"export.gguf={self.gguf} must end in .gguf")
