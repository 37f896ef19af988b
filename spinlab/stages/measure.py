"""Stages `eval-*`: perplexity, zero-shot accuracy, bytes and effective bits of a network."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import Artifact
from spinlab.data.questions import identities
from spinlab.evaluate.perplexity import perplexity
from spinlab.evaluate.zeroshot import zeroshot
from spinlab.files import write_json
from spinlab.finite import check_finite
from spinlab.model.modules import embedding_of, map_of
from spinlab.networks.quantized import cache_bits
from spinlab.stages.original import Original
from spinlab.stages.run import Run
from spinlab.stages.text import windows_in
from spinlab.stages.variant import Variant
from spinlab.weights.quantized import QuantizedWeight, effective_bits

_STORED_BYTES = 2  # of a number that is not quantized: embedding, head and norms rest in 16 bits


def measure(
    run: Run, original: Original, evaluation: Artifact, variant: Variant
) -> dict[str, float]:
    """Return a variant's metrics, as a stage.

    Several processes share out the windows of a perplexity; the first one does the rest.
    """

    def work(out: Path) -> None:
        model, weights = variant.assemble(run, original)
        metrics = _perplexities(run, model, evaluation, variant)
        check_finite(metrics, f"the network {variant.name} is broken")
        if parallel.is_main():
            metrics |= _sizes(run, original, model, weights)
            metrics |= _accuracies(run, original, model, variant)
            write_json(out / "metrics.json", metrics)

    depends = _depends(run, original, evaluation, variant)
    made = run.cache.run(f"eval-{variant.name}", depends, work, together=True)
    metrics = json.loads((made.path / "metrics.json").read_text())
    return {f"{name}/{variant.name}": value for name, value in metrics.items()}


def _tasks(run: Run, variant: Variant) -> list[str]:
    measured = run.config.eval
    return measured.tasks if variant.name in measured.task_variants else []


def _depends(run: Run, original: Original, evaluation: Artifact, variant: Variant) -> list[Any]:
    """Name everything that a variant's metrics depend on."""
    measured = run.config.eval
    depends = [*variant.depends(run, original), evaluation.key, measured.batch]
    if tasks := _tasks(run, variant):
        questions = identities(tasks, measured.task_source)
        depends += [questions, measured.limit, measured.task_batch, version("lm_eval")]
    return depends


def _sizes(
    run: Run,
    original: Original,
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight] | None,
) -> dict[str, float]:
    sizes: dict[str, float] = {"bytes": stored_bytes(original.shape, weights)}
    if weights is not None:
        numbers = {site.path: site.numbers for site in map_of(original.shape).sites}
        sizes["bits/weights"] = effective_bits(weights, numbers)
        sizes["bits/kv"] = cache_bits(model)
    return sizes


def _perplexities(
    run: Run, model: PreTrainedModel, evaluation: Artifact, variant: Variant
) -> dict[str, float]:
    batch = run.config.eval.batch
    return {
        f"ppl/{label}": perplexity(model, windows, batch, f"{variant.name} {label}")
        for label, windows in windows_in(evaluation).items()
    }


def _accuracies(
    run: Run, original: Original, model: PreTrainedModel, variant: Variant
) -> dict[str, float]:
    tasks, measured = _tasks(run, variant), run.config.eval
    if not tasks:
        return {}
    found = zeroshot(
        model,
        original.tokenizer,
        tasks,
        limit=measured.limit,
        batch_size=measured.task_batch,
        source=cast(Any, measured.task_source),
    )
    return {f"zeroshot/{name}": value for name, value in found.items()}


def stored_bytes(
    model: PreTrainedModel, weights: Mapping[str, QuantizedWeight] | None = None
) -> int:
    """Return the bytes of a checkpoint: packed weights, and 16 bits for every other number.

    A quantized model stores embedding and head apart, even where the original ties them.
    """
    numbers = sum(p.numel() for p in model.parameters())
    if weights is None:
        return numbers * _STORED_BYTES
    numbers -= sum(w.levels.numel() for w in weights.values())
    if model.config.tie_word_embeddings:
        numbers += embedding_of(model).weight.numel()
    packed = sum(
        t.numel() * t.element_size() for w in weights.values() for t in w.tensors().values()
    )
    return numbers * _STORED_BYTES + packed
