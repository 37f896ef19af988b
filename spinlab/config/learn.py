"""Settings of how rotations are learned."""

from dataclasses import dataclass, field
from typing import ClassVar

from spinlab.config.checks import at_least, choice, count, positive
from spinlab.config.quant import QuantConfig
from spinlab.errors import InputError

GRAD_NORMS = ("riemannian", "euclidean")
CHECKPOINTS = ("auto", "on", "off")
SHARDS = ("auto", "on", "off")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weigh the terms of the loss; those with weight 0 are not computed.

    cross_entropy and kl see the whole network's logits, layer_mse every decoder layer's output for
    the original's input. kurtosis, whip and further ones look at single rotated activations: they
    need no backpropagation, and without other terms nothing is quantized while they are gathered.
    """

    cross_entropy: float = 1.0  # next token (SpinQuant)
    kl: float = 0.0  # KL(original || quantized) of the next token's distribution
    kl_top_k: int = 0  # over the original's k likeliest tokens, renormalized; 0: over all
    layer_mse: float = 0.0  # |output - original's|² / |original's|², mean over layers
    kurtosis: float = 0.0  # |kurtosis - 1.8|, that of a uniform distribution (KurTail)
    whip: float = 0.0  # sum of exp(-|x|) over channels (DartQuant)
    further: dict[str, float] = field(default_factory=dict)  # of spinlab.learn.objectives, by name

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            at_least(f"learn.objective.{name}", weight, 0)
        at_least("learn.objective.kl_top_k", self.kl_top_k, 0)
        if not any(self.weights.values()):
            raise InputError(f"learn.objective has no term: weigh one of {', '.join(OBJECTIVES)}")

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of all terms by name."""
        return {name: getattr(self, name) for name in OBJECTIVES} | self.further

    @property
    def on_logits(self) -> bool:
        """Tell whether a term needs the network's logits."""
        return self.cross_entropy > 0 or self.kl > 0

    @property
    def end_to_end(self) -> bool:
        """Tell whether a term needs backpropagation through quantized layers."""
        return self.on_logits or self.layer_mse > 0

    @property
    def on_activations(self) -> bool:
        """Tell whether a term looks at single rotated activations."""
        return self.kurtosis > 0 or self.whip > 0 or any(self.further.values())

    @property
    def needs_teacher(self) -> bool:
        """Tell whether a term compares with the original model."""
        return self.kl > 0 or self.layer_mse > 0


OBJECTIVES = ("cross_entropy", "kl", "layer_mse", "kurtosis", "whip")


@dataclass(frozen=True)
class RatesConfig:
    """Set how far a step moves each part of what is learned."""

    r1: float = 1.5
    r2: float | None = None  # as r1 if absent
    r3: float | None = None  # as r1 if absent
    inputs: float | None = None  # rotations of single inputs; as r1 if absent, 0: scales alone
    scale: float = 0.0  # log scales of single inputs; 0: not learned
    clip: float = 0.0  # log clip ratios of weights: searched once, then learned; 0: not learned
    input_clip: float = 0.0  # log clip ratios, one for each quantized input; 0: not learned
    kv_clip: float = 0.0  # those of the keys and of the values of each layer; 0: not learned

    def __post_init__(self) -> None:
        for name in ("r1", "r2", "r3"):
            positive(f"learn.lr.{name}", getattr(self, name))
        for name in ("inputs", "scale", "clip", "input_clip", "kv_clip"):
            at_least(f"learn.lr.{name}", getattr(self, name), 0)

    @property
    def of_ranges(self) -> bool:
        """Tell whether ranges of weights, inputs, keys or values are learned."""
        return any((self.clip, self.input_clip, self.kv_clip))

    def of_rotation(self, name: str) -> float:
        """Return the rate of r1, r2, r3, or of the rotation of an input of another name."""
        rate = {"r1": self.r1, "r2": self.r2, "r3": self.r3}.get(name, self.inputs)
        return self.r1 if rate is None else rate


@dataclass(frozen=True)
class OptimizerConfig:
    """Choose how rotations step: the optimizer, its schedule, what bounds a step and its drift."""

    name: str = "cayley_sgd"  # in spinlab.learn.optim
    momentum: float = 0.0
    cap_step: bool = True  # Cayley SGD: step at most 1/||W||_1
    schedule: str = "linear"  # of all rates
    warmup: int = 0
    # what curves show and max_grad_norm clips: the norm of gradients along the manifold, or of
    # those of rotations as free matrices (SpinQuant's code)
    grad_norm: str = "riemannian"
    max_grad_norm: float | None = 1.0  # of all rotations together, before the step
    project_every: int = 25  # steps between polar re-projections

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"learn.optimizer.momentum={self.momentum} must lie in [0, 1)")
        at_least("learn.optimizer.warmup", self.warmup, 0)
        choice("learn.optimizer.grad_norm", self.grad_norm, GRAD_NORMS)
        for name in ("max_grad_norm", "project_every"):
            positive(f"learn.optimizer.{name}", getattr(self, name))


@dataclass(frozen=True)
class LearnConfig:
    """Set how rotations are optimized (SpinQuant sec. 3.2; Li et al. 2020). steps=0: not at all.

    `inputs` among the rotations are the transforms that rotation.inputs puts before linears; `r3`
    is one matrix, or as many as layers, as rotation.r3_per_layer says. With none ranges are learned
    alone, behind whatever rotations and maps there are.
    """

    place: ClassVar[str] = "learn"
    steps: int = 100
    batch: int = 8  # sequences per step, whatever the hardware
    micro_batch: int = 1  # sequences per forward pass and process; gradients add up to the batch
    sequence_length: int = 2048
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rotations: list[str] = field(default_factory=lambda: ["r1", "r2"])
    lr: RatesConfig = field(default_factory=RatesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    quantize_weights: bool = False  # W4 in the loop (for RTN) or 16-bit weights (for GPTQ)
    clip_refresh: int = 10  # steps between clip searches, with weights quantized in the loop
    max_loss_ratio: float = 3.0  # a loss above so many times the first one stops the run
    save_every: int = 5
    dtype: str | None = None  # of the network while it learns; the model's if absent
    checkpoint: str = "auto"  # recompute activations in the backward pass: if memory asks for it
    # spread weights over processes: those of 16 bits, rounded ones if memory asks for it
    shard: str = "auto"

    def __post_init__(self) -> None:
        count("learn.steps", self.steps, 0)
        for name in ("batch", "micro_batch"):
            count(f"learn.{name}", getattr(self, name))
        for name in ("clip_refresh", "save_every"):
            positive(f"learn.{name}", getattr(self, name))
        at_least("learn.sequence_length", self.sequence_length, 2)
        if self.batch % self.micro_batch:
            raise InputError(
                f"learn.micro_batch={self.micro_batch} does not divide learn.batch={self.batch}"
            )
        choice("learn.dtype", self.dtype or "float32", ("bfloat16", "float32", "float64"))
        choice("learn.checkpoint", self.checkpoint, CHECKPOINTS)
        choice("learn.shard", self.shard, SHARDS)
        if not self.max_loss_ratio > 1:
            raise InputError(f"learn.max_loss_ratio={self.max_loss_ratio} must be above 1")
        for name in self.rotations:
            choice("learn.rotations", name, ("r1", "r2", "r3", "inputs"))
        if self.steps:
            self._check_terms()

    def rounds(self, quant: QuantConfig) -> bool:
        """Tell whether any weight is rounded in the loop."""
        return self.quantize_weights and quant.quantizes("weights")

    def _check_terms(self) -> None:
        """Refuse settings that would do nothing."""
        if self.quantize_weights and not self.objective.end_to_end:
            raise InputError(
                "learn.quantize_weights=true needs a term that sees rounded weights: weigh "
                "learn.objective.cross_entropy, kl or layer_mse"
            )
        if self.objective.on_activations and "inputs" in self.rotations:
            raise InputError(
                "learn.objective.kurtosis, whip and further look at what R1 and R2 alone make of "
                "activations: leave inputs out of learn.rotations, or these terms"
            )
        if "r3" in self.rotations and not self.objective.end_to_end:
            raise InputError(
                "r3 in learn.rotations needs a term that sees coded keys: weigh "
                "learn.objective.cross_entropy, kl or layer_mse, or leave r3 out"
            )
        if not self.rotations and not self.lr.of_ranges:
            raise InputError(
                "learn.rotations is empty: name r1, r2, r3 or inputs, learn ranges alone "
                "(learn.lr.clip, input_clip or kv_clip), or use learn=none"
            )
        if "inputs" in self.rotations and self.lr.inputs == 0 and not self.lr.scale:
            raise InputError(
                "learn.lr.inputs=0 holds the rotations of inputs, and learn.lr.scale=0 their "
                "scales: set one of them, or leave inputs out of learn.rotations"
            )
        if self.optimizer.warmup >= self.steps:
            raise InputError(
                f"learn.optimizer.warmup={self.optimizer.warmup} leaves nothing of "
                f"learn.steps={self.steps}"
            )
