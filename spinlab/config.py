"""The schema of an experiment: every setting, its default and its limits, in one place.

YAML files under conf/ hold deltas to these dataclasses. Nothing here imports torch, so that
`python -m spinlab --help` answers at once.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from spinlab.errors import InputError
from spinlab.limits import at_least, bits, choice, positive, ratio

ROTATION_KINDS = ("none", "identity", "random", "hadamard")
OPTIMIZERS = ("cayley_sgd", "riemannian_sgd", "riemannian_adam")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("rtn", "gptq")
BACKENDS = ("auto", "cpu", "reference")
VARIANTS = ("fp", "rtn", "init", "fake", "int4")


@dataclass(frozen=True)
class ModelConfig:
    """Say which weights are loaded: a local `path`, else packaged GGUF, else a hub `hub` id."""

    name: str = "toy"
    path: str | None = None  # local folder with config.json and safetensors; beats the other two
    package: str | None = None  # installed distribution that carries `file`, a GGUF checkpoint
    file: str | None = None
    hub: str | None = None
    revision: str = "main"
    weights: str = "random"  # pretrained, or random: `architecture` with seeded weights
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of the family's config
    outlier_channels: int = 0  # random weights: residual channels scaled up, as real models have
    outlier_scale: float = 30.0
    dtype: str = "float32"  # what the networks run in; fusing is always float64

    def __post_init__(self) -> None:
        choice("model.weights", self.weights, ("pretrained", "random"))
        choice("model.dtype", self.dtype, ("float32", "float64", "bfloat16"))
        if self.weights == "pretrained" and not (self.path or self.package or self.hub):
            raise InputError("no model is named: set model.path, model.hub or model.package")
        if self.hub and self.package and not self.path:
            raise InputError(
                f"model.hub={self.hub} and model.package={self.package} name two models: "
                "set one of them to null"
            )


@dataclass(frozen=True)
class DataConfig:
    """Name the texts: wiki, c4 (packaged), wikitext2 (hub), or the path of a .txt file."""

    calibration: str = "wiki"
    evaluation: list[str] = field(default_factory=lambda: ["wiki", "c4"])


@dataclass(frozen=True)
class RotationConfig:
    """Say how each rotation starts; `none` leaves it out, `identity` only matters if learned."""

    r1: str = "hadamard"
    r2: str = "hadamard"
    r3: str = "hadamard"
    r4: str = "hadamard"

    def __post_init__(self) -> None:
        for name in ("r1", "r2", "r3", "r4"):
            choice(f"rotation.{name}", getattr(self, name), ROTATION_KINDS)


@dataclass(frozen=True)
class LearnConfig:
    """Set how R1 and R2 are optimized (SpinQuant sec. 3.2; Li et al. 2020). steps=0: not at all."""

    steps: int = 100
    batch: int = 8  # sequences per step, whatever the hardware
    micro_batch: int = 1  # sequences per forward pass; gradients add up to the batch
    sequence_length: int = 2048
    rotations: list[str] = field(default_factory=lambda: ["r1", "r2"])
    quantize_weights: bool = False  # W4 in the loop (for RTN) or 16-bit weights (for GPTQ)
    clip_refresh: int = 10  # steps between clip searches, with weights quantized in the loop
    lr_clip: float = 0.0  # of log clip ratios: searched once, then learned and kept; 0: not learned
    optimizer: str = "cayley_sgd"
    lr: float = 1.5  # of R1
    lr_r2: float | None = None  # of R2; as R1 if absent
    schedule: str = "linear"
    warmup: int = 0
    momentum: float = 0.0
    cap_step: bool = True  # Cayley SGD: step at most 1/||W||_1
    max_grad_norm: float | None = 1.0  # of all rotations together, before the step
    project_every: int = 25  # steps between polar re-projections
    save_every: int = 5

    def __post_init__(self) -> None:
        at_least("learn.steps", self.steps, 0)
        at_least("learn.lr_clip", self.lr_clip, 0)
        for name in ("batch", "micro_batch", "clip_refresh", "lr", "project_every", "save_every"):
            positive(f"learn.{name}", getattr(self, name))
        at_least("learn.sequence_length", self.sequence_length, 2)
        at_least("learn.warmup", self.warmup, 0)
        positive("learn.lr_r2", self.lr_r2)
        positive("learn.max_grad_norm", self.max_grad_norm)
        if not 0 <= self.momentum < 1:
            raise InputError(f"learn.momentum={self.momentum} must lie in [0, 1)")
        if self.momentum and self.optimizer == "riemannian_adam":
            raise InputError("learn.momentum has no meaning with riemannian_adam: set it to 0")
        if self.batch % self.micro_batch:
            raise InputError(
                f"learn.micro_batch={self.micro_batch} does not divide learn.batch={self.batch}"
            )
        choice("learn.optimizer", self.optimizer, OPTIMIZERS)
        choice("learn.schedule", self.schedule, SCHEDULES)
        for name in self.rotations:
            choice("learn.rotations", name, ("r1", "r2"))


@dataclass(frozen=True)
class TensorQuant:
    """Describe one quantizer: bits (16 = off), symmetry, group size (0 = channel or token)."""

    bits: int = 4
    symmetric: bool = False
    group_size: int = 0
    clip_ratio: float = 1.0  # of the range that is kept; for weights on top of their clip search


@dataclass(frozen=True)
class QuantConfig:
    """Set the formats of weights and activations. The head stays 16-bit, as in the papers."""

    weights: TensorQuant = field(default_factory=lambda: TensorQuant(symmetric=True))
    activations: TensorQuant = field(default_factory=TensorQuant)
    o_proj_per_head: bool = True  # o_proj input: one scale per token and head (SpinQuant)

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            tensor: TensorQuant = getattr(self, name)
            bits(f"quant.{name}.bits", tensor.bits)
            ratio(f"quant.{name}.clip_ratio", tensor.clip_ratio)
            at_least(f"quant.{name}.group_size", tensor.group_size, 0)


@dataclass(frozen=True)
class WeightsConfig:
    """Choose how weights are rounded: RTN or GPTQ (Frantar et al. 2022), and the clip search."""

    method: str = "rtn"
    clip_search: bool = True
    clip_norm: float = 2.4
    clip_grid: int = 100
    clip_max_shrink: float = 0.8
    samples: int = 128  # GPTQ calibration windows
    sequence_length: int = 2048
    block_size: int = 128
    percdamp: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        choice("weights.method", self.method, METHODS)
        for name in ("clip_norm", "clip_grid", "samples", "block_size", "percdamp"):
            positive(f"weights.{name}", getattr(self, name))
        at_least("weights.sequence_length", self.sequence_length, 2)
        at_least("weights.clip_grid*clip_max_shrink", self.clip_grid * self.clip_max_shrink, 1)
        if not 0 < self.clip_max_shrink < 1:
            raise InputError(f"weights.clip_max_shrink={self.clip_max_shrink} must lie in (0, 1)")


@dataclass(frozen=True)
class KVConfig:
    """Set the KV cache: bits of keys and values per token, head and group (0 = head_dim)."""

    k_bits: int = 4
    v_bits: int = 4
    symmetric: bool = False
    group_size: int = 0
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            bits(f"kv.{name}", value)
            if 8 < value < 16:
                raise InputError(f"kv.{name}={value}: the cache stores 2 to 8 bits, or 16 (off)")
        ratio("kv.clip_ratio", self.clip_ratio)
        at_least("kv.group_size", self.group_size, 0)


@dataclass(frozen=True)
class RuntimeConfig:
    """Choose where it runs: device, integer back end, CPU threads (0 = all)."""

    device: str = "auto"
    backend: str = "auto"  # auto: cpu on a CPU, the exact float product elsewhere
    threads: int = 0

    def __post_init__(self) -> None:
        choice("runtime.backend", self.backend, BACKENDS)
        at_least("runtime.threads", self.threads, 0)


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

    def __post_init__(self) -> None:
        for name in self.variants:
            choice("eval.variants", name, VARIANTS)
        for name in self.task_variants:
            choice("eval.task_variants", name, VARIANTS)
        choice("eval.task_source", self.task_source, ("packaged", "hub"))
        at_least("eval.window", self.window, 2)
        positive("eval.max_windows", self.max_windows)
        at_least("eval.limit", self.limit, 2)  # one question has no standard error
        positive("eval.batch", self.batch)
        positive("eval.task_batch", self.task_batch)


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
class Config:
    """One experiment."""

    name: str = "custom"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        quantized = self.learn.quantize_weights and self.quant.weights.bits < 16
        if self.learn.lr_clip > 0 and not (quantized and self.weights.method == "rtn"):
            raise InputError(
                f"learn.lr_clip={self.learn.lr_clip} learns the ranges that RTN keeps: it needs "
                "learn.quantize_weights=true, weights of fewer than 16 bits and weights=rtn"
            )
        for name in ("weights", "activations"):
            count = getattr(self.quant, name).bits
            if "int4" in self.eval.variants and count > 8 and (name, count) != ("activations", 16):
                raise InputError(
                    f"quant.{name}.bits={count} cannot run on integer kernels: "
                    "use at most 8 bits or leave int4 out of eval.variants"
                )


def plain(config: Any) -> Any:
    """Return a dataclass tree as plain dicts and lists, ready for JSON."""
    if is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config
