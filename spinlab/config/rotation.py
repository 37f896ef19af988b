"""Settings of the rotations: how they start, and how they are learned."""

from dataclasses import dataclass, field

from spinlab.errors import InputError
from spinlab.limits import at_least, choice, positive

ROTATION_KINDS = (
    "none",
    "identity",
    "random",
    "gaussian",
    "bernoulli",
    "hadamard",
    "exact_hadamard",
    "duquant",
)
ONLINE_KINDS = tuple(kind for kind in ROTATION_KINDS if kind != "duquant")
INPUT_GROUPS = ("qkv", "o", "gate_up", "down")
OPTIMIZERS = ("cayley_sgd", "riemannian_sgd", "riemannian_adam")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DuQuantConfig:
    """Set DuQuant's search (Lin et al. 2024, sec. 3): block-diagonal rotations around a zigzag."""

    block_size: int = 128  # a width that it does not divide gets its largest divisor below
    steps: int = 256  # greedy steps of each of the two rotations
    legacy_index: bool = False  # swap the channel that the public code swaps, not the outlier's

    def __post_init__(self) -> None:
        at_least("rotation.duquant.block_size", self.block_size, 2)
        at_least("rotation.duquant.steps", self.steps, 1)


@dataclass(frozen=True)
class StatisticsConfig:
    """Set the calibration windows that smoothing and DuQuant look at."""

    samples: int = 128
    sequence_length: int = 2048

    def __post_init__(self) -> None:
        at_least("rotation.statistics.samples", self.samples, 1)
        at_least("rotation.statistics.sequence_length", self.sequence_length, 2)


@dataclass(frozen=True)
class RotationConfig:
    """Say how each rotation starts; `none` leaves it out, `identity` only matters if learned."""

    r1: str = "hadamard"
    r2: str = "hadamard"
    r3: str = "hadamard"
    r4: str = "hadamard"
    cross_head: str = "none"  # before o_proj, across heads, online (QuaRot); R2 turns inside them
    online: bool = True  # false leaves out whatever runs online: R3, R4, cross_head
    r4_block: int = 0  # R4 as equal blocks of this power of two; 0: over the full width
    inputs: str = "none"  # duquant: a transform of its own before every group of linears, online
    smooth: float | None = None  # alpha of SmoothQuant's scales, folded into norms and weights
    smooth_groups: list[str] = field(default_factory=lambda: ["qkv", "gate_up"])
    load: str | None = None  # a RotationSet (.safetensors) or SpinQuant's R.bin, instead of r1, r2
    duquant: DuQuantConfig = field(default_factory=DuQuantConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def __post_init__(self) -> None:
        for name in ("r1", "r2"):
            choice(f"rotation.{name}", getattr(self, name), ROTATION_KINDS)
        for name in ("r3", "r4"):
            choice(f"rotation.{name}", getattr(self, name), ONLINE_KINDS)
        choice("rotation.cross_head", self.cross_head, ("none", "hadamard"))
        choice("rotation.inputs", self.inputs, ("none", "duquant"))
        if self.r4_block and (self.r4_block < 2 or self.r4_block & (self.r4_block - 1)):
            raise InputError(f"rotation.r4_block={self.r4_block} must be a power of two, or 0")
        if self.r4_block and self.r4 not in ("hadamard", "exact_hadamard", "none"):
            raise InputError(
                f"rotation.r4_block cuts a Hadamard R4: rotation.r4={self.r4} has none"
            )
        if not self.online and self.inputs != "none":
            raise InputError(
                f"rotation.inputs={self.inputs} runs online: set none, or rotation.online=true"
            )
        if self.load and not self.load.endswith((".safetensors", ".bin")):
            raise InputError(f"rotation.load={self.load} must end in .safetensors or .bin")
        if self.load and (self.inputs != "none" or self.smooth is not None or not self.online):
            raise InputError(
                f"rotation.load={self.load} brings its rotations: leave rotation.inputs, "
                "rotation.smooth and rotation.online as they are"
            )
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Refuse what cannot be combined: scales and rotations of the same space."""
        used = {name for name in ("r1", "r2", "r4", "cross_head") if getattr(self, name) != "none"}
        if self.inputs != "none" and used:
            raise InputError(
                f"rotation.inputs={self.inputs} takes the place of R1, R2 and R4: set "
                f"{', '.join(f'rotation.{name}=none' for name in sorted(used))}"
            )
        if self.smooth is None:
            return
        if not 0 <= self.smooth <= 1:
            raise InputError(f"rotation.smooth={self.smooth} must lie in [0, 1]")
        spaces = {"qkv": {"r1"}, "gate_up": {"r1"}, "o": {"r2", "cross_head"}, "down": set()}
        for group in self.smooth_groups:
            choice("rotation.smooth_groups", group, INPUT_GROUPS)
            if clash := spaces[group] & used:
                raise InputError(
                    f"rotation.smooth scales single channels of the {group} input, which "
                    f"rotation.{min(clash)} mixes: set rotation.{min(clash)}=none"
                )

    @property
    def needs_statistics(self) -> bool:
        """Tell whether anything here is made from activations."""
        return self.smooth is not None or self.searches

    @property
    def searches(self) -> bool:
        """Tell whether DuQuant's search is used, which looks at whole activations."""
        return "duquant" in (self.r1, self.r2, self.inputs)


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
