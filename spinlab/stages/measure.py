"""Stages `eval-*`: what a network's predictions are worth, its bytes and its effective bits.

Names of the metrics, all before `/<variant>`; those of a comparison with the original (fp) are
absent where `eval.paired` is off or fp is not measured:

ppl/<text>                   perplexity
kl/<text>, kl_p99/<text>     KL(original || variant) per token in nats: mean and 99th percentile
flips/<text>                 share of tokens whose likeliest next token is not the original's
zeroshot/<task>/<metric>     accuracy, `<metric>_stderr`, and `n` questions
zeroshot_mean/…              mean over tasks and its comparison (`spinlab.metrics.paired`)
paired/<task>/…              comparison with the original's answers (there too)
bytes, bits/weights, bits/kv checkpoint; effective bits, scales and zero points included, of a
                             cache of 4096 tokens
coded/kv                     share of what the tokens of a window see of the cache that is coded
and what `spinlab.stages.recall` measures where it is asked for.
"""

import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import Artifact
from spinlab.data.questions import identities
from spinlab.files import write_json
from spinlab.finite import check_finite
from spinlab.kv.bits import coded_share
from spinlab.kv.path import kv_path
from spinlab.metrics.divergence import Divergence
from spinlab.metrics.paired import mean_accuracy, paired
from spinlab.metrics.perplexity import perplexity, places_of
from spinlab.metrics.predictions import Predictions, read_predictions, write_predictions
from spinlab.metrics.states import States
from spinlab.metrics.zeroshot import zeroshot
from spinlab.model.modules import embedding_of, map_of
from spinlab.model.network import Network
from spinlab.networks.quantized import bits_of_cache
from spinlab.stages.original import Original
from spinlab.stages.recall import bytes_of_cache, recall, recall_settings
from spinlab.stages.run import Run
from spinlab.stages.text import windows_in
from spinlab.stages.variant import Variant
from spinlab.weights.quantized import QuantizedWeight, effective_bits

PREDICTIONS = "predictions.json.gz"
_STORED_BYTES = 2  # of a number that is not quantized: embedding, head and norms rest in 16 bits


def measure(
    run: Run,
    original: Original,
    evaluation: Artifact,
    variant: Variant,
    reference: Artifact | None,
) -> Artifact:
    """Measure a variant, as a stage. reference: what this stage left of the original, if compared.

    Several processes share out the windows of a perplexity; the first one does the rest.
    """

    def work(out: Path) -> None:
        network, weights = variant.network(run, original)
        model = network.last(_batches(run, evaluation))
        states = States(reference.path if reference else out)
        metrics = _of_texts(run, model, evaluation, variant, states)
        check_finite(metrics, f"the network {variant.name} is broken")
        if parallel.is_main():
            metrics |= _sizes(run, original, model, weights)
            asked = model if network.part is None else network
            del model  # a part: others come and go now
            metrics |= _accuracies(run, original, asked, variant, out)
            folders = out, reference and reference.path
            metrics |= recall(run, original, asked, variant, windows_in(evaluation), folders)
            write_json(out / "metrics.json", metrics)

    depends = _depends(run, original, evaluation, variant)
    return run.cache.run(f"eval-{variant.name}", depends, work, together=True)


def metrics_of(
    made: Artifact, name: str, reference: Artifact | None, chosen: Mapping[str, str]
) -> dict[str, float]:
    """Return the metrics of the variant `name`, compared with the original's where it is given.

    chosen: `eval.task_metrics`.
    """
    metrics = json.loads((made.path / "metrics.json").read_text())
    if predictions := _predictions(made):
        metrics |= mean_accuracy(predictions, chosen)
        if reference is not None:
            metrics |= paired(_predictions(reference), predictions, chosen)
    return {f"{metric}/{name}": value for metric, value in metrics.items()}


def _predictions(made: Artifact) -> Predictions:
    """Return the answers of a variant, of no task where none was asked."""
    path = made.path / PREDICTIONS
    return read_predictions(path) if path.exists() else {}


def _tasks(run: Run, variant: Variant) -> list[str]:
    measured = run.config.eval
    return measured.tasks if variant.name in measured.task_variants else []


def _depends(run: Run, original: Original, evaluation: Artifact, variant: Variant) -> list[Any]:
    """Name everything that a variant's metrics depend on."""
    measured = run.config.eval
    depends = [*variant.depends(run, original), evaluation.key, measured.batch, measured.compares]
    depends += recall_settings(measured, run.config.seed)
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
    sizes: dict[str, float] = {
        "bytes": stored_bytes(original.shape, weights, run.config.quant.tied.quantizes)
    }
    if weights is not None:
        numbers = {site.path: site.numbers for site in map_of(original.shape).sites}
        sizes["bits/weights"] = effective_bits(weights, numbers)
        sizes["bits/kv"] = bits_of_cache(model)
        sizes["coded/kv"] = _coded(run, original)
        sizes |= bytes_of_cache(model)
    return sizes


def _coded(run: Run, original: Original) -> float:
    """Return the share of the cache that is coded in windows, whichever runtime keeps it."""
    found = map_of(original.shape)
    path = kv_path(run.config.kv, found.coded_widths, layers=found.attentions)
    return coded_share(path, run.config.eval.window)


def _batches(run: Run, evaluation: Artifact) -> list[torch.Tensor]:
    """Return what a network is called with for the perplexities of all texts, in this order."""
    batch, texts = run.config.eval.batch, windows_in(evaluation).values()
    return [windows[places] for windows in texts for places in places_of(len(windows), batch)]


def _of_texts(
    run: Run, model: PreTrainedModel, evaluation: Artifact, variant: Variant, states: States
) -> dict[str, float]:
    found: dict[str, float] = {}
    for label, windows in windows_in(evaluation).items():
        title = f"{variant.name} {label}"
        ask = partial(perplexity, model, windows, run.config.eval.batch, title)
        if not run.config.eval.compares:
            found[f"ppl/{label}"] = ask()
        elif variant.is_original:
            with states.keeping(model, label) as keep:
                found[f"ppl/{label}"] = ask(keep)
        else:
            divergence = Divergence(states, label, windows, run.device)
            found[f"ppl/{label}"] = ask(divergence.see)
            found |= {f"{name}/{label}": value for name, value in divergence.metrics().items()}
    return found


def _accuracies(
    run: Run, original: Original, model: PreTrainedModel | Network, variant: Variant, out: Path
) -> dict[str, float]:
    """Ask the questions of the tasks, and keep the answers."""
    tasks, measured = _tasks(run, variant), run.config.eval
    if not tasks:
        return {}
    found, predictions = zeroshot(
        model,
        original.tokenizer,
        tasks,
        limit=measured.limit,
        batch_size=measured.task_batch,
        source=cast(Any, measured.task_source),
    )
    write_predictions(out / PREDICTIONS, predictions)
    return {f"zeroshot/{name}": value for name, value in found.items()}


def stored_bytes(
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight] | None = None,
    tied: bool = False,
) -> int:
    """Return the bytes of a checkpoint: packed weights, and 16 bits for every other number.

    A quantized model stores embedding and head apart, even where the original ties them, unless
    they are rounded as one (tied).
    """
    numbers = sum(p.numel() for p in model.parameters())
    if weights is None:
        return numbers * _STORED_BYTES
    numbers -= sum(w.levels.numel() for w in weights.values())
    if model.config.tie_word_embeddings and not tied:
        numbers += embedding_of(model).weight.numel()
    packed = sum(
        t.numel() * t.element_size() for w in weights.values() for t in w.tensors().values()
    )
    return numbers * _STORED_BYTES + packed
