"""What a network answered to every question, as lm-eval judged it, in a file of its own.

`{task: [{"id", "digest", metric: {"answer", "right"}, …}]}`: id is the place in the split, digest
tells what was asked, whoever asks, and answer is the number of the choice that a metric prefers.
LAMBADA has one choice, the last word: answer 1 where the network would say it, else 0.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spinlab.files import content_key, replacing

Answers = list[dict[str, Any]]
Predictions = dict[str, Answers]


def predictions_of(samples: Mapping[str, Sequence[Any]], tasks: Mapping[str, Any]) -> Predictions:
    """Return predictions from lm-eval's logged samples and its task objects, both by task."""
    return {
        name: [_prediction(tasks[name], sample) for sample in asked]
        for name, asked in samples.items()
    }


def _prediction(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    digest = content_key([list(request) for request in sample["arguments"]])
    chosen = _answers(task, sample)
    of_metrics = {
        metric: {"answer": chosen[metric], "right": bool(sample[metric])}
        for metric in sample["metrics"]
        if metric in chosen
    }
    return {"id": sample["doc_id"], "digest": digest, **of_metrics}


def _answers(task: Any, sample: Mapping[str, Any]) -> dict[str, int]:
    """Return the choice of each metric, by the rules of lm-eval's `process_results`."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"acc": int(responses[0][1])}
    likelihoods = np.array([likelihood for likelihood, _ in responses])
    lengths = np.array([float(len(choice)) for choice in task.doc_to_choice(sample["doc"])])
    return {
        "acc": int(likelihoods.argmax()),
        "acc_norm": int((likelihoods / lengths).argmax()),
    }


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write compressed JSON, the same bytes for the same predictions, whole or not at all."""
    text = json.dumps(predictions, sort_keys=True, separators=(",", ":"))
    with replacing(path) as temporary, temporary.open("wb") as file:  # noqa: SIM117
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            packed.write(text.encode())


def read_predictions(path: Path) -> Predictions:
    """Return what `write_predictions` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))
