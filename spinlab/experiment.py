"""Run one experiment: its stages, its record, its trackers, and the table at the end."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from spinlab import parallel
from spinlab.cache import NotCached
from spinlab.code import code_digest
from spinlab.config import Config
from spinlab.device import choose_device, set_arithmetic
from spinlab.files import replacing, write_json, writing
from spinlab.finite import check_finite
from spinlab.held import Hold
from spinlab.learn import warn_of_mismatch
from spinlab.machine import memory_told
from spinlab.model.load import describe_model
from spinlab.report.figures.curves import draw_curves
from spinlab.report.figures.outliers import TITLES, draw_outliers
from spinlab.report.tables.record import result_table
from spinlab.rotation.stored import read_about
from spinlab.stages.export import export
from spinlab.stages.measure import PREDICTIONS
from spinlab.stages.outliers import peak_ratios, worst_layer
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.preflight import preflight
from spinlab.track.environment import environment, packages
from spinlab.track.journal import Journal
from spinlab.track.mirrors.base import Outcome
from spinlab.track.record import Record
from spinlab.track.trackers import Trackers

log = logging.getLogger(__name__)

_SMALL_GAIN = 0.05  # of perplexity, either way
_ANSWERS = "predictions/{}.json.gz"  # of a variant
# the metric of each variant's hand-off gate; invariance/init is the rotated model's own
_HANDOFF = {v: f"invariance/{v}" for v in ("rtn", "fake", "integer")} | {"init": "handoff/init"}


def run(config: Config, overrides: list[str], sweep: bool = False) -> Record:
    """Run every stage that is not cached and return the record, which is also saved.

    sweep: the overrides are shared by several runs, not each of which reads all of them.
    The record is written after every stage: what is finished stays when a later stage fails.
    Several processes go through the same stages, and the first one writes and shows what comes of
    them. One that fails ends at once, so that the others do not wait for it.
    """
    start = time.perf_counter()
    parallel.start(choose_device(config.runtime.device).type)
    set_arithmetic(config.runtime)
    disable_progress_bar()  # of loading a checkpoint, which happens once per network
    trackers = Trackers()
    with memory_told():
        pipeline = Pipeline(config, trackers.log)
        preflight(pipeline, () if sweep else overrides)
        facts = environment() | _means(pipeline)
        model = describe_model(config.model, pipeline.original.shape)
        record = Record(config, overrides, facts, pipeline.identity, model, sweep=sweep)
        record.mirrors = trackers.stopped
        _recorded(pipeline, record, trackers)
    if parallel.is_main():
        _show(record, time.perf_counter() - start)
    parallel.stop()
    return record


def finished(config: Config, overrides: list[str]) -> Path | None:
    """Return the complete record of these settings, inputs and means; None where there is none.

    No model is loaded. What is exported is no part of a record: only a run writes that. Nor is a
    run finished that lacks a file beside its record.
    """
    disable_progress_bar()
    pipeline = Pipeline(config)
    try:
        with pipeline.run.cache.only_cached():
            identity = pipeline.identity
    except NotCached:
        return None
    record = Record(config, overrides, {"packages": packages()} | _means(pipeline), identity)
    saved = record.kept()
    if saved is None or config.export.targets:
        return None
    whole = all((record.folder / name).is_file() for name in _left(config, saved["metrics"]))
    return record.path if whole else None


def _means(pipeline: Pipeline) -> dict[str, str]:
    """Return what makes the numbers of settings and inputs."""
    return {"backend": pipeline.run.backend, "code": code_digest(__name__)}


def _left(config: Config, metrics: dict[str, float]) -> Iterator[str]:
    """Yield the files that a complete run has beside its record and its log."""
    yield from ("layers.json", "figures/outliers.png")
    if "learn/first_loss" in metrics:
        yield "figures/curves.png"
    if config.eval.tasks:
        scored = (v for v in config.eval.variants if v in config.eval.task_variants)
        yield from map(_ANSWERS.format, scored)


def _recorded(pipeline: Pipeline, record: Record, trackers: Trackers) -> None:
    """Go through the stages; save the record and close trackers and log however they end.

    The folder is held before the record stands in it: one of a run that nobody holds is cleared
    away.
    """
    kept: dict[str, Any] = {"figures": [], "artifacts": {}, "layers": {}}  # for the trackers
    with ExitStack() as end:  # the last is done first, and each of them whatever another raises
        with writing(record.folder, "paths.runs"):
            hold = Hold(record.folder)
        end.callback(hold.release)
        record.save()
        journal = Journal(record.folder / "run.log", record.overrides)
        end.callback(journal.close)
        end.callback(_finish, record, trackers, kept)
        end.callback(_save, pipeline, record)
        try:
            if parallel.is_main():
                trackers.start(record)
            rotations = _rotations(pipeline, record, trackers.log)
            kept["artifacts"][rotations] = read_about(rotations)
            _evaluations(pipeline, record, trackers)
            kept["layers"] = _layers(pipeline, record)
            kept["figures"] += _figures(pipeline, record)
            check_finite(record.metrics, "the record cannot be complete")
            export(pipeline, record.as_json())
            record.status = "complete"
        except BaseException as error:
            record.end(error)
            journal.tell(error)
            raise


def _finish(record: Record, trackers: Trackers, kept: dict[str, Any]) -> None:
    """Close the trackers, and keep in the record which of them could not."""
    trackers.finish(Outcome(record.status == "complete", record.metrics, **kept))
    if trackers.stopped:
        record.save()


def _rotations(pipeline: Pipeline, record: Record, on_step) -> Path:
    """Make and learn the rotations; return their file."""
    outcome, key = pipeline.outcome
    curve = _read(outcome / "curve.json", [])
    if any(report.key == key and report.cached for report in pipeline.run.cache.reports):
        for step, values in enumerate(curve):
            on_step(step, values)
    learned = pipeline.learned.path
    gate = _read(pipeline.initial.path / "gate.json", {})
    record.metrics["invariance/init"] = gate.pop("logits_error")
    gate = _read(learned / "gate.json", {})
    record.metrics["invariance/learned"] = gate.pop("logits_error")
    record.metrics |= {f"orthogonality/{name}": error for name, error in gate.items()}
    if curve:
        record.metrics |= {
            "learn/first_loss": curve[0]["loss"],
            "learn/last_loss": curve[-1]["loss"],
        }
    warn_of_mismatch(pipeline.rotations("fake"), record.config.weights.method)
    _save(pipeline, record)
    return learned / "rotations.safetensors"


def _evaluations(pipeline: Pipeline, record: Record, trackers: Trackers) -> None:
    """Measure every variant, those on integers once they have passed the gate of the hand-off."""
    for variant in record.config.eval.variants:
        if variant != "fp":
            record.metrics[_HANDOFF[variant]] = pipeline.handoff_error(variant)
        measured = pipeline.measure(variant)
        record.metrics |= measured
        trackers.measured(variant, measured)
        _keep_predictions(pipeline, record, variant)
        _save(pipeline, record)
    for text in (text.label for text in pipeline.texts[1]):
        both = [record.metrics.get(f"ppl/{text}/{v}") for v in ("integer", "fake")]
        if both[0] is not None and both[1] is not None:
            record.metrics[f"gap/{text}"] = both[0] / both[1] - 1
        _gain(record, text)


def _keep_predictions(pipeline: Pipeline, record: Record, variant: str) -> None:
    """Put a variant's answers beside the record, where it was asked."""
    answers = pipeline.measured(variant).path / PREDICTIONS
    if not answers.exists() or not parallel.is_main():
        return
    place = record.folder / _ANSWERS.format(variant)
    with writing(record.folder, "paths.runs"):
        place.parent.mkdir(exist_ok=True)
        with replacing(place) as temporary:
            shutil.copyfile(answers, temporary)


def _gain(record: Record, text: str) -> None:
    """Record by how much learning lowered perplexity; say so where it hardly did, or raised it."""
    start, end = (record.metrics.get(f"ppl/{text}/{v}") for v in ("init", "fake"))
    if start is None or end is None or "learn/first_loss" not in record.metrics:
        return
    record.metrics[f"learn/gain/{text}"] = 1 - end / start
    if end > (1 + _SMALL_GAIN) * start:
        log.warning(
            "learning made %s perplexity worse, from %.2f to %.2f: with these settings it leads "
            "away from what it starts from, which learn=none keeps",
            text,
            start,
            end,
        )
    elif end > (1 - _SMALL_GAIN) * start:
        log.warning(
            "learning hardly moved %s perplexity, from %.2f %s to %.2f: from this start, with "
            "these settings, it did not matter",
            text,
            start,
            "up" if end > start else "down",
            end,
        )


def _layers(pipeline: Pipeline, record: Record) -> dict[str, list[float]]:
    """Return what is measured of every layer, by name, and keep it beside the record."""
    ratios = {name: peak_ratios(p) for name, p in pipeline.outliers().items()}
    record.metrics |= {f"outliers/{name}": r.mean().item() for name, r in ratios.items()}
    found = {f"outliers/{name}": r.tolist() for name, r in ratios.items()}
    if "fake" in record.config.eval.variants:
        found["error/fake"] = pipeline.layers("fake")
    if parallel.is_main():
        with writing(record.folder, "paths.runs"):
            write_json(record.folder / "layers.json", found)
    return found


def _figures(pipeline: Pipeline, record: Record) -> list[Path]:
    """Draw the layer whose input has the worst outliers, and how the rotations were learned."""
    peaks, curve = pipeline.outliers(), _read(pipeline.outcome.path / "curve.json", [])
    if not parallel.is_main():
        return []
    layer, folder = worst_layer(peaks), record.folder / "figures"
    profiles = {TITLES[name]: p[layer].numpy() for name, p in peaks.items()}
    with writing(record.folder, "paths.runs"):
        site = f"{record.model_name}, attention input of layer {layer}"
        found = [draw_outliers(profiles, site).save(folder / "outliers.png")]
        if curve:
            found.append(draw_curves({"": curve}).save(folder / "curves.png"))
    return found


def _read(path: Path, default):
    return json.loads(path.read_text()) if path.exists() else default


def _save(pipeline: Pipeline, record: Record) -> None:
    record.stages = pipeline.run.cache.as_json()
    record.save()


def _show(record: Record, seconds: float) -> None:
    print(f"\n{result_table(record.as_json())}\n")
    print(f"record: {record.path}   ({seconds:.0f} s)")
