"""Settings that nothing reads in the context of the others: one rule for all of them.

What a command sets and nothing would read is refused; what a preset sets is told in one line, for
a preset serves more than one experiment. Settings that contradict each other are refused where
they are declared.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from spinlab.config import Config, plain
from spinlab.config.quant import CALIBRATED, KINDS, Levels
from spinlab.config.rotation import SAME
from spinlab.config.values import nodes, words_of
from spinlab.errors import InputError

log = logging.getLogger(__name__)

Rule = tuple[str, list[str]]  # a reason, and the settings that are not read for it


def check_read(
    config: Config, overrides: Sequence[str], exported: bool = False, rules: Iterable[Rule] = ()
) -> None:
    """Raise InputError for an override (`key=value`) that nothing reads; log what else is not.

    exported: the model is one that was rotated and exported before. rules: those of parts that
    the settings only name, beside the ones here.
    """
    found = unread(config, exported, rules)
    given = words_of(overrides)
    for name, reason in found.items():
        # a group's name is no setting: learn=toy chooses a preset
        if any("." in key and (_within(name, key) or _within(key, name)) for key in given):
            raise InputError(f"{name} is not read with {reason}: leave it out, or change that")
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        log.info("%-12s with %s nothing reads %s", "settings", reason, ", ".join(names))


def _within(name: str, stem: str) -> bool:
    return f"{name}.".startswith(f"{stem}.")


def unread(config: Config, exported: bool = False, rules: Iterable[Rule] = ()) -> dict[str, str]:
    """Return what differs from its default and is not read, by dotted name, with the reason."""
    found: dict[str, str] = {}
    settings = {k: v for k, v in nodes(plain(Config())) if not (isinstance(v, dict) and v)}
    changed = [k for k, v in nodes(plain(config)) if k in settings and v != settings[k]]
    for reason, names in (*_rules(config, exported), *rules):
        for name in changed:
            if any(_within(name, stem) for stem in names):
                found.setdefault(name, reason)
    return found


def _others(part: Any, place: str, *read: str) -> list[str]:
    """Name the settings of a part but for those that are read."""
    return [f"{place}.{f.name}" for f in fields(part) if f.name not in read]


def _rules(config: Config, exported: bool) -> Iterator[Rule]:
    """Yield reasons that hold, and what is not read for them; a name stands for all below it."""
    yield from _of_model(config)
    yield from _of_learning(config)
    yield from _of_weights(config)
    yield from _of_formats(config)
    if exported:
        yield "model.path=…, an exported model, which brings its rotations", ["rotation"]
    else:
        yield from _of_rotations(config)
    yield from _of_measures(config)
    for target, option in {"compressed_tensors": "profile", "gguf": "gguf_type"}.items():
        if getattr(config.export, target) is None:
            yield f"export.{target}=null", [f"export.{option}"]


def _of_model(config: Config) -> Iterator[Rule]:
    model = config.model
    if model.weights == "random":
        names = ("hub", "package", "file", "revision")
        yield "random weights", [f"model.{name}" for name in names]
        if not model.outlier_channels:
            yield "model.outlier_channels=0", ["model.outlier_scale"]
        return
    drawn = ("architecture", "outlier_channels", "outlier_scale")
    yield "pretrained weights", [f"model.{name}" for name in drawn]
    if model.path:
        names = ("hub", "package", "file", "revision")
        yield "model.path, which comes first,", [f"model.{name}" for name in names]
    elif model.package:
        yield "model.package, which has one revision,", ["model.revision"]
    else:
        yield "model.hub, which has one checkpoint,", ["model.file"]


def _of_learning(config: Config) -> Iterator[Rule]:
    learn = config.learn
    if not learn.steps:
        yield "learn.steps=0", _others(learn, "learn", "steps")
        return
    of_names = f"learn.rotations=[{','.join(learn.rotations)}]"
    if not learn.rotations:
        yield of_names, _others(learn.optimizer, "learn.optimizer", "schedule", "warmup")
    rates = [getattr(learn.lr, name) for name in learn.rotations]
    if "r1" not in learn.rotations and None not in rates:
        yield f"rates of their own for {of_names}", ["learn.lr.r1"]
    if "r2" not in learn.rotations:
        yield of_names, ["learn.lr.r2"]
    if "r3" not in learn.rotations:
        yield of_names, ["learn.lr.r3"]
    if "inputs" not in learn.rotations:
        yield of_names, ["learn.lr.inputs", "learn.lr.scale"]
    if not learn.quantize_weights:
        yield "learn.quantize_weights=false", ["learn.clip_refresh"]
    if learn.lr.clip:
        yield "learned clip ratios, which are searched once,", ["learn.clip_refresh"]
    if not learn.objective.kl:
        yield "learn.objective.kl=0", ["learn.objective.kl_top_k"]


def _of_weights(config: Config) -> Iterator[Rule]:
    weights = config.weights
    read = ("method", "clip", weights.method)
    yield f"weights.method={weights.method}", _others(weights, "weights", *read)
    if not weights.clip.search:
        yield "weights.clip.search=false", _others(weights.clip, "weights.clip", "search")
    if not config.quant.rounds_weights:
        yield "weights of 16 bits", ["weights"]


def _of_formats(config: Config) -> Iterator[Rule]:
    quant = config.quant
    rounded = {f"quant.{kind}" for kind in KINDS if quant.quantizes(kind)}
    rounded |= {f"kv.{side}" for side in config.kv.sides if config.kv.codes(side)}
    formats: dict[str, Levels] = {f"kv.{side}": codec for side, codec in config.kv.sides.items()}
    for name in ("weights", "activations", "head", "embedding", "tied"):
        formats[f"quant.{name}"] = getattr(quant, name)
    for name, format in formats.items():
        if not format.quantizes and name not in rounded:
            yield f"{name}.bits=16", _others(format, name, "bits")
    if not config.kv.codes("keys"):
        yield "kv.keys.bits=16", ["kv.key_bias"]
    if not config.kv.codes("keys", "values"):
        exact = ("first_layers", "last_layers", "sinks", "window")
        yield "keys and values of 16 bits", [f"kv.{name}" for name in exact]
    if not quant.calibrates:
        yield f"no input in {CALIBRATED}", ["quant.calibration"]
    if not quant.quantizes("activations"):
        yield "activations of 16 bits", ["quant.o_proj_per_head"]


def _of_rotations(config: Config) -> Iterator[Rule]:
    rotation = config.rotation
    if rotation.load and rotation.load.endswith(".safetensors"):
        yield (
            "rotation.load=….safetensors, which holds all rotations",
            _others(rotation, "rotation", "load", "factors"),
        )
        return
    if rotation.load:
        yield "rotation.load=….bin, which holds R1 and R2", ["rotation.r1", "rotation.r2"]
    others = [name for name in ("blocks", "wush") if name != rotation.inputs]
    yield f"rotation.inputs={rotation.inputs}", [f"rotation.{name}" for name in others]
    if not rotation.turns_inputs:
        yield f"rotation.inputs={rotation.inputs}", ["rotation.factors"]
    if not rotation.searches:
        yield "no rotation by DuQuant", ["rotation.duquant"]
    if not rotation.needs_statistics:
        yield "neither smoothing, DuQuant nor WUSH", ["rotation.statistics"]
    if rotation.smooth is None:
        yield "rotation.smooth=null", ["rotation.smooth_groups"]
    if not rotation.online:
        made = [part for part in ("r3", "r4", "cross_head") if getattr(rotation, part) != "none"]
        blocks = ("r4_block", "r3_per_layer")
        yield "rotation.online=false", [f"rotation.{part}" for part in (*made, *blocks)]
    if rotation.r1 == "none":
        yield "rotation.r1=none", ["rotation.r1_block"]
    if rotation.r3 == "none":
        yield "rotation.r3=none", ["rotation.r3_per_layer"]
    if rotation.r3 in SAME and not (config.learn.steps and "r3" in config.learn.rotations):
        reason = f"rotation.r3={rotation.r3}, which is the same in every layer until it is learned,"
        yield reason, ["rotation.r3_per_layer"]
    if rotation.r4 == "none":
        yield "rotation.r4=none", ["rotation.r4_block"]


def _of_measures(config: Config) -> Iterator[Rule]:
    measured, tracker = config.eval, config.tracker
    variants = ",".join(measured.variants)
    if not replace(measured, paired=True).compares:
        yield f"eval.variants=[{variants}], where nothing is compared with fp,", ["eval.paired"]
    batch = () if measured.needle else ("task_batch",)
    if not measured.tasks:
        parts = ("task_metrics", "task_source", "task_variants", "limit", *batch)
        yield "eval.tasks=[]", [f"eval.{part}" for part in parts]
    elif not measured.scored:
        parts = ("tasks", "task_metrics", "task_source", "limit", *batch)
        reason = f"eval.variants=[{variants}], none of them in eval.task_variants,"
        yield reason, [f"eval.{part}" for part in parts]
    if tracker.wandb.mode == "disabled":
        yield "tracker.wandb.mode=disabled", _others(tracker.wandb, "tracker.wandb", "mode")
