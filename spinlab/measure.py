"""Measure the networks of a pipeline: perplexity, zero-shot accuracy, bytes, outliers."""

import json
import logging
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import plain
from spinlab.data.questions import identities
from spinlab.errors import ResultError
from spinlab.evaluate.perplexity import perplexity
from spinlab.evaluate.zeroshot import zeroshot
from spinlab.files import write_json, write_tensors
from spinlab.finite import check_finite
from spinlab.kv.cache import kv_bits
from spinlab.model.seams import linears_of
from spinlab.networks import ExactNetworks, Networks, channel_peaks, stored_bytes
from spinlab.pipeline import Pipeline
from spinlab.rotation.check import logits_error, logits_of
from spinlab.rotation.rotations import RotationSet
from spinlab.start import SETTINGS
from spinlab.weights.quantized import QuantizedWeight, effective_bits, load_weights

log = logging.getLogger(__name__)


class BrokenHandoff(ResultError):
    """Say that integers do not compute what the numbers they stand for do."""


def evaluate(pipeline: Pipeline, variant: str) -> dict[str, float]:
    """Return a variant's perplexities, accuracies, bytes and effective bits, as a stage.

    Several processes share out the windows of a perplexity; the first one does the rest.
    """

    def work(out: Path) -> None:
        model, weights = network(pipeline, variant)
        metrics = _perplexities(pipeline, model, variant)
        check_finite(metrics, f"the network {variant} is broken")
        if parallel.is_main():
            metrics |= _sizes(pipeline, model, weights) | _accuracies(pipeline, model, variant)
            write_json(out / "metrics.json", metrics)

    depends = _metrics_depend(pipeline, variant)
    code = (*_CODE, "evaluate", "measure", "parallel")
    folder, _ = pipeline.stages.run(f"eval-{variant}", depends, work, code, together=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {f"{name}/{variant}": value for name, value in metrics.items()}


def network(
    pipeline: Pipeline, variant: str
) -> tuple[PreTrainedModel, Mapping[str, QuantizedWeight] | None]:
    """Assemble a variant from its cached rotations and weights; `fp` has no quantized weights."""
    if variant == "fp":
        return pipeline.original(), None
    rotations, weights = _parts(pipeline, variant)
    model = _quantized(pipeline.networks, variant, rotations, weights, pipeline.backend)
    return model, weights


def _quantized(
    networks: Networks,
    variant: str,
    rotations: RotationSet,
    weights: Mapping[str, QuantizedWeight],
    backend: str,
) -> PreTrainedModel:
    """Assemble a variant that multiplies integers: `fake` emulates them, others have kernels."""
    if variant == "fake":
        return networks.emulated(rotations, weights)
    return networks.integer(rotations, weights, backend)


def handoff_error(pipeline: Pipeline, variant: str) -> float:
    """Return how far a variant's network is from dequantized floats in float64, as a stage.

    The gate of the hand-off: where float noise is too small to flip a level, products of
    dequantized floats and of integers, by kernels or emulated, must give the same logits. The
    result is max|Δlogits| relative to their standard deviation. Raises BrokenHandoff above 1e-6.
    """

    def work(out: Path) -> None:
        networks = ExactNetworks(pipeline.original, pipeline.config.quant, pipeline.config.kv)
        parts = _parts(pipeline, variant)
        ids = pipeline.gate_ids.to(pipeline.device)
        expected = logits_of(partial(networks.dequantized, *parts), ids)
        integers = partial(_quantized, networks, variant, *parts, pipeline.backend)
        error = logits_error(logits_of(integers, ids), expected)
        log.info("%-12s %s differs by %.1e of the logits' spread", "handoff", variant, error)
        if not error <= _HANDOFF_LIMIT:
            raise BrokenHandoff(
                f"{variant}'s integers are not the numbers they stand for: logits differ by "
                f"{error:.1e} of their spread (limit {_HANDOFF_LIMIT:.0e}); runtime.backend="
                "reference multiplies them exactly"
            )
        write_json(out / "gate.json", {"logits_error": error})

    depends = [*_network_depends(pipeline, variant), pipeline.calibration[1], pipeline.config.seed]
    folder, _ = pipeline.stages.run(f"handoff-{variant}", depends, work, _CODE)
    return json.loads((folder / "gate.json").read_text())["logits_error"]


def outliers(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """Return per network the largest |attention input| of each layer and channel, as a stage."""

    def work(out: Path) -> None:
        ids = pipeline.gate_ids
        networks = {} if pipeline.transformed else {"before": RotationSet()}
        networks |= {name: pipeline.rotation_of(v)[0] for name, v in _ROTATED.items()}
        peaks = {n: channel_peaks(pipeline.networks.rotated(r), ids) for n, r in networks.items()}
        check_finite(peaks, "attention inputs on the way to the outlier figure")
        write_tensors(out / "peaks.safetensors", peaks)

    depends = [pipeline.source, pipeline.calibration[1], pipeline.initial[1], pipeline.learned[1]]
    return load_file(pipeline.stages.run("outliers", depends, work, _CODE)[0] / "peaks.safetensors")


_HANDOFF_LIMIT = 1e-6
_CODE = ("measure", "model", "rotation", "quant", "kv", "weights", "runtime", "networks", *SETTINGS)
_ROTATED = {"init": "init", "learned": "fake"}  # network of the figure -> variant


def _parts(pipeline: Pipeline, variant: str) -> tuple[RotationSet, Mapping[str, QuantizedWeight]]:
    """Load a variant's rotations and weights; with 16-bit weights there are none of the latter."""
    rotations, _ = pipeline.rotation_of(variant)
    if not pipeline.config.quant.quantizes_weights:
        return rotations, {}
    return rotations, load_weights(pipeline.weights_of(variant)[0])


def _tasks(pipeline: Pipeline, variant: str) -> list[str]:
    evaluate = pipeline.config.eval
    return evaluate.tasks if variant in evaluate.task_variants else []


def _network_depends(pipeline: Pipeline, variant: str) -> list[Any]:
    """Name everything that a variant's network depends on."""
    config = pipeline.config
    depends: list[Any] = [pipeline.source]
    if variant != "fp" and config.quant.quantizes_weights:
        depends.append(pipeline.weights_of(variant)[1])
    if variant != "fp":
        depends.append(pipeline.rotation_of(variant)[1])
        depends += [plain(config.quant), plain(config.kv)]
    if variant not in ("fp", "fake"):
        depends.append(pipeline.backend)
    return depends


def _metrics_depend(pipeline: Pipeline, variant: str) -> list[Any]:
    """Name everything that a variant's metrics depend on."""
    evaluate = pipeline.config.eval
    depends = [*_network_depends(pipeline, variant), pipeline.evaluation[1], evaluate.batch]
    if tasks := _tasks(pipeline, variant):
        questions = identities(tasks, evaluate.task_source)
        depends += [questions, evaluate.limit, evaluate.task_batch, version("lm_eval")]
    return depends


def _sizes(
    pipeline: Pipeline, model: PreTrainedModel, weights: Mapping[str, QuantizedWeight] | None
) -> dict[str, float]:
    sizes: dict[str, float] = {"bytes": stored_bytes(pipeline.shape, weights)}
    if weights is not None:
        numbers = {name: linear.weight.numel() for name, _, _, linear in linears_of(pipeline.shape)}
        sizes["bits/weights"] = effective_bits(weights, numbers)
        sizes["bits/kv"] = kv_bits(model, pipeline.config.kv)
    return sizes


def _perplexities(pipeline: Pipeline, model: PreTrainedModel, variant: str) -> dict[str, float]:
    windows, batch = load_file(pipeline.evaluation[0]), pipeline.config.eval.batch
    return {
        f"ppl/{text.label}": perplexity(
            model, windows[text.label], batch, f"{variant} {text.label}"
        )
        for text in pipeline.texts[1]
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
