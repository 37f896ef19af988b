"""What can be known about an experiment before its first stage, whatever is cached.

Settings that contradict each other were refused when they were composed (`spinlab.config`). Here
they meet files and the hub, then the model's shape, without its weights. What takes long comes
last: every weight is read, and the texts are cut into tokens, for only these tell whether a text
is long enough. Every check lives in the package of its subject.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from spinlab.config import Config, KVConfig, plain
from spinlab.config.unread import Rule, check_read
from spinlab.data.text import check_length
from spinlab.errors import InputError
from spinlab.export.base import check_exports
from spinlab.fakequant.insert import input_paths
from spinlab.files import check_writable
from spinlab.kv.codecs import unread_by_codecs
from spinlab.kv.path import KVPath, kv_path
from spinlab.learn import check_learning, unread_by_optimizer
from spinlab.memory.check import check_memory
from spinlab.memory.job import Job
from spinlab.metrics.zeroshot import check_questions, check_tokenizer
from spinlab.model.context import check_context
from spinlab.model.modules import map_of
from spinlab.rotation.initial import check_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import check_runtime
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import remaining
from spinlab.stages.rotations import gate_tokens
from spinlab.stages.text import windows_in
from spinlab.weights.ends import check_ends
from spinlab.weights.layerwise import check_samples, check_weight_groups
from spinlab.weights.methods import check_method

log = logging.getLogger(__name__)


def preflight(pipeline: Pipeline, overrides: Sequence[str] = ()) -> None:
    """Raise InputError, with the cure, for what would fail in a stage.

    overrides: what the command sets for this run alone.
    """
    _check_places(pipeline.config)
    config = pipeline.config
    unread = [*unread_by_codecs(config.kv), *unread_by_optimizer(config.learn.optimizer)]
    unread += _unread_by_model(pipeline)
    if overrides:
        unread.append(("one run alone, without -m,", ["sweep"]))
    check_read(config, overrides, pipeline.given.transformed, unread)
    _read_texts(pipeline)
    check_questions(pipeline.config.eval)
    _check_fits(pipeline)
    _check_given(pipeline)
    left = remaining(pipeline)
    words = [len(text.text.split()) for text in pipeline.texts[1]]
    job = Job(
        pipeline.config,
        pipeline.original.shape,
        pipeline.run.device,
        left,
        words=words,
        transformed=pipeline.given.transformed,
    )
    if pipeline.config.runtime.offload and job.has("learn") and not job.loads_no_whole:
        log.warning(
            "learning holds the whole model on %s, unless it is loaded by shards: runtime.offload "
            "is about all other stages",
            job.device,
        )
    check_memory(job)
    _ = pipeline.original.identity
    if pipeline.config.eval.scored:
        check_tokenizer(pipeline.original.tokenizer)
    _check_windows(pipeline)


def _unread_by_model(pipeline: Pipeline) -> Iterator[Rule]:
    """Yield, as `spinlab.config.unread` does, what the model does not read."""
    apart = pipeline.config.kv.key_bias == KVConfig().key_bias
    if not apart and not map_of(pipeline.original.shape).key_biases:
        yield "a model whose keys have no bias that could be kept apart", ["kv.key_bias"]


def _check_places(config: Config) -> None:
    """See that cache, records and exports can be written where the settings say."""
    for name, folder in plain(config.paths).items():
        check_writable(Path(folder), f"paths.{name}")
    check_exports(config)


def _check_fits(pipeline: Pipeline) -> None:
    """Hold formats, rotations and windows against the model's widths."""
    config, model = pipeline.config, pipeline.original.shape
    check_context(config, model.config)
    check_method(config.weights)
    check_weight_groups(map_of(model), config.quant)
    check_ends(model, config.quant)
    input_paths(map_of(model), RotationSet(), config.quant)
    kv = kv_path(config.kv, map_of(model).coded_widths, layers=map_of(model).attentions)
    _tell_uncoded(kv, config)
    uncoded = all(kv.sides(n) == (None, None) for n in range(len(map_of(model).layers)))
    if config.learn.steps and config.learn.lr.kv_clip and uncoded:
        raise InputError(
            f"learn.lr.kv_clip={config.learn.lr.kv_clip} learns ranges of keys and values, and "
            "kv.first_layers and kv.last_layers keep all layers in 16 bits: set learn.lr.kv_clip=0"
        )
    if config.rounded_on_text and (columns := config.weights.by_columns):
        check_samples(columns.samples, config.weights)
    if pipeline.run.backend == "triton":
        check_runtime(model, kv)


def _tell_uncoded(kv: KVPath, config: Config) -> None:
    """Warn where texts are measured that the cache's codec does not reach, or reaches in part."""
    if not config.kv.codes("keys", "values"):
        return
    measured = {"an evaluation window": config.eval.window}
    measured |= {f"a text of eval.needle={length}": length for length in config.eval.needle}
    layers = [n for n in range(max(len(kv.layers), 1)) if kv.sides(n) != (None, None)]
    for name, length in measured.items():
        most = max((kv.history(n).coded(length) for n in layers), default=0)
        if not most:
            log.warning(
                "no token of %s is coded: kv.sinks, kv.window, kv.first_layers, kv.last_layers or "
                "an unfinished run keep all %d in 16 bits, and what is measured is such a cache, "
                "whatever its bits at longer texts",
                name,
                length,
            )
        elif most < length / 2:
            log.warning("at most %d of %d tokens of %s are coded", most, length, name)


def _check_given(pipeline: Pipeline) -> None:
    """Read the rotations that are given, or see that those of the settings can be made."""
    given, brought = pipeline.given.file, pipeline.given.rotations
    if given is None or brought is None or given.suffix == ".bin":
        check_rotations(pipeline.config.rotation, map_of(pipeline.original.shape))
    check_learning(pipeline.config, brought)


def _read_texts(pipeline: Pipeline) -> None:
    """Read the texts and say which part of which plays which role."""
    calibration, evaluation = pipeline.texts
    scored = ", ".join(f"{text.label} ({text.part})" for text in evaluation)
    log.info(
        "%-12s calibration on %s (%s), evaluation on %s",
        "texts",
        calibration.label,
        calibration.part,
        scored,
    )


def _check_windows(pipeline: Pipeline) -> None:
    """Cut the texts, as stages of their own, and see that every stage finds a window in them."""
    shapes = {name: tuple(ids.shape) for name, ids in windows_in(pipeline.evaluation).items()}
    log.info("%-12s %s", "windows", ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    tokens, name = pipeline.calibration.tokens, pipeline.texts[0].label
    lengths = {
        **pipeline.config.calibration_windows,
        "the gates' window": gate_tokens(pipeline.original),
    }
    for setting, length in lengths.items():
        check_length(tokens, length, name, setting)
