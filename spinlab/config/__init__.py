"""The schema of an experiment: every setting, its default and its limits, in one place.

YAML files under conf/ hold deltas to these dataclasses. Nothing here imports torch, so that
`python -m spinlab --help` answers at once.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spinlab.config.data import DataConfig
from spinlab.config.eval import ACCURACIES, VARIANTS, EvalConfig, accuracy_of_mean
from spinlab.config.kv import (
    CodecChange,
    CodecConfig,
    KVConfig,
    KVOverride,
    LloydMaxConfig,
    QJLConfig,
)
from spinlab.config.learn import LearnConfig, ObjectiveConfig, OptimizerConfig, RatesConfig
from spinlab.config.learned import check_learned_heads, check_maps
from spinlab.config.model import ModelConfig
from spinlab.config.offload import check_offload
from spinlab.config.outputs import (
    ExportConfig,
    PathsConfig,
    SweepConfig,
    TrackerConfig,
    WandbConfig,
)
from spinlab.config.quant import KINDS, FormatChange, Override, QuantConfig, TensorQuant
from spinlab.config.rotation import DuQuantConfig, RotationConfig, StatisticsConfig
from spinlab.config.runtime import RuntimeConfig
from spinlab.config.values import check_values
from spinlab.config.weights import (
    KEEP_RANGES,
    ClipSearch,
    GPTAQConfig,
    GPTQConfig,
    LWCConfig,
    QronosConfig,
    WeightsConfig,
)
from spinlab.errors import InputError

__all__ = [
    "ACCURACIES",
    "VARIANTS",
    "ClipSearch",
    "CodecChange",
    "CodecConfig",
    "Config",
    "DataConfig",
    "DuQuantConfig",
    "EvalConfig",
    "ExportConfig",
    "FormatChange",
    "GPTAQConfig",
    "GPTQConfig",
    "KVConfig",
    "KVOverride",
    "LWCConfig",
    "LearnConfig",
    "LloydMaxConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Override",
    "PathsConfig",
    "QJLConfig",
    "QronosConfig",
    "QuantConfig",
    "RatesConfig",
    "RotationConfig",
    "RuntimeConfig",
    "StatisticsConfig",
    "SweepConfig",
    "TensorQuant",
    "TrackerConfig",
    "WandbConfig",
    "WeightsConfig",
    "accuracy_of_mean",
    "plain",
]


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
    export: ExportConfig = field(default_factory=ExportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        self._check_name()
        check_values(plain(self))
        self._check_learned_ranges()
        if self.learn.steps:
            self._check_learning()
        if columns := self.weights.by_columns:
            self._check_columns(columns)
        if "integer" in self.eval.variants:
            self._check_integers()
        self._check_metric()
        if self.runtime.offload:
            check_offload(self.model, self.eval, self.export)

    def _check_metric(self) -> None:
        """Refuse a sweep's metrics of a variant or a text that is not measured."""
        ending = "_dev" if self.data.held_out == "development" else ""
        texts = [Path(name).name + ending for name in self.data.evaluation]
        for metric in self.sweep.metrics:
            *kind, variant = metric.split("/")
            of_text = len(kind) == 2 and kind[0] in ("ppl", "kl", "flips", "diverges")
            if of_text and not any(fnmatchcase(text, kind[1]) for text in texts):
                raise InputError(
                    f"sweep.metric={metric} is of a text that is not measured: with "
                    f"data.held_out={self.data.held_out} texts are called {', '.join(texts)}"
                )
            if variant in set(VARIANTS) - set(self.eval.variants):
                raise InputError(
                    f"sweep.metric={metric} is of a variant that is not measured: add "
                    f"{variant} to eval.variants=[{','.join(self.eval.variants)}]"
                )

    def _check_name(self) -> None:
        """Refuse a name that is no folder, or leads out of the folder of all runs."""
        for part in self.name.split("/"):
            # of 255 bytes that a name may have on most systems, W&B's take some
            leads_out = part in ("", ".", "..") or part.startswith("~")
            if leads_out or "\\" in part or not part.isprintable() or len(part.encode()) > 200:
                raise InputError(
                    f"name={self.name!r} is no name for a folder: use printable words of at most "
                    "200 bytes, with / between them, and no .., ~ or backslash"
                )

    def _check_columns(self, columns: GPTQConfig) -> None:
        """Refuse ranges of groups that cannot be taken as their columns are reached."""
        groups, place = [t.group_size for t in self.quant.formats("weights")], columns.place
        if columns.act_order and not columns.static_groups and any(groups):
            raise InputError(
                f"{place}.act_order with quant.weights.group_size={max(groups)} needs "
                f"{place}.static_groups=true: groups are runs of columns, act-order does not "
                "visit them in turn"
            )

    @property
    def rounded_on_text(self) -> bool:
        """Tell whether a variant is measured whose weights are rounded on calibration text."""
        calibrated = self.weights.windows is not None
        variants = set(self.eval.variants) - {"fp", "rtn"}
        return calibrated and self.quant.rounds_weights and bool(variants)

    @property
    def calibration_windows(self) -> dict[str, int]:
        """Name the settings of the calibration windows that are in use, with their lengths."""
        rotation = self.rotation
        gathers = rotation.needs_statistics and not rotation.load
        uses = (
            (rotation.statistics, gathers),
            (self.learn, self.learn.steps > 0),
            (self.weights.windows, self.rounded_on_text),
            (self.quant.calibration, self.quant.calibrates),
        )
        return {
            f"{part.place}.sequence_length": part.sequence_length
            for part, used in uses
            if part is not None and used
        }

    def _check_learned_ranges(self) -> None:
        """Refuse ranges of weights that nothing learns, or that rounding would not keep."""
        learn, weights = self.learn, self.quant.weights
        cure = "learn.lr.clip=0"
        if not learn.lr.clip:
            return
        if not learn.quantize_weights:
            reason, cure = "and the loop rounds none", f"learn.quantize_weights=true or {cure}"
        elif not weights.quantizes:
            reason = f"and they have {weights.bits} bits"
        elif not self.weights.keeps_ranges:
            reason = f"and weights={self.weights.method} finds its own"
            cure += f", or weights={', '.join(KEEP_RANGES)}"
        else:
            return
        raise InputError(
            f"learn.lr.clip={learn.lr.clip} learns ranges of rounded weights, {reason}: set {cure}"
        )

    def _check_learning(self) -> None:
        """Refuse to learn what no quantizer would notice."""
        learn, quant = self.learn, self.quant
        inputs = quant.quantizes("activations")
        given = self.rotation.inputs != "none" or self.rotation.load
        if "inputs" in learn.rotations and not given:
            raise InputError(
                "inputs in learn.rotations are the transforms of rotation.inputs: use "
                "rotation=duquant, scales or blocks, or 'learn.rotations=[r1,r2]'"
            )
        if "inputs" in learn.rotations and self.rotation.inputs == "scales" and not learn.lr.scale:
            raise InputError(
                "rotation.inputs=scales with learn.lr.scale=0 leaves inputs in learn.rotations "
                "nothing: set learn.lr.scale, or 'learn.rotations=[r1,r2]' rotation.inputs=none"
            )
        check_maps(self.rotation, learn)
        check_learned_heads(self.rotation, learn, self.kv)
        if learn.lr.input_clip and not inputs:
            raise InputError(
                f"learn.lr.input_clip={learn.lr.input_clip}: activations of 16 bits have no range: "
                "set learn.lr.input_clip=0"
            )
        if learn.lr.kv_clip and (reason := self.kv.has_no_ranges()):
            raise InputError(
                f"learn.lr.kv_clip={learn.lr.kv_clip} learns ranges of keys and values, and "
                f"{reason}: set learn.lr.kv_clip=0"
            )
        if learn.rounds(quant) or not learn.objective.end_to_end:
            return
        on = {name for name in ("r1", "r2") if getattr(self.rotation, name) != "none"}
        if "r1" in on & set(learn.rotations) and not inputs:
            raise InputError(
                "with 16-bit activations, and 16-bit weights in the loop, nothing depends on R1: "
                "set learn.quantize_weights=true or quant.activations.bits"
            )
        if "r2" in on & set(learn.rotations) and not inputs and self.kv.values.bits == 16:
            raise InputError(
                "with 16-bit activations and values, nothing depends on R2: leave r2 out of "
                "learn.rotations"
            )

    def _check_integers(self) -> None:
        """Refuse formats that integer kernels cannot run; 16-bit ones are left to floats."""
        for kind in KINDS:
            for format in self.quant.formats(kind):
                if format.bits > 8 and (format.quantizes or kind == "weights"):
                    raise InputError(
                        f"quant.{kind}.bits={format.bits} cannot run on integer kernels: "
                        "use at most 8 bits or leave integer out of eval.variants"
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
