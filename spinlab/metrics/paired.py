"""Accuracies that are compared question by question, which cancels what questions have in common.

Questions are independent of one another, and two networks that answer the same ones are not: the
standard error of a difference is that of the mean of differences, sqrt(var(d) / n).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spinlab.config import ACCURACIES, accuracy_of_mean
from spinlab.metrics.predictions import Answers, Predictions

log = logging.getLogger(__name__)


def mean_accuracy(predictions: Predictions, chosen: Mapping[str, str]) -> dict[str, float]:
    """Return `zeroshot_mean/…`: the mean of tasks' accuracies, its standard error, their count.

    chosen: by task, the accuracy that enters the mean (`accuracy_of_mean`).
    """
    rights = [_rights(asked, _metric(task, asked, chosen)) for task, asked in predictions.items()]
    mean, error = _mean_of_means(rights)
    found = {"accuracy": mean, "stderr": error, "tasks": len(rights)}
    return {f"zeroshot_mean/{name}": value for name, value in found.items()}


def paired(
    original: Predictions, other: Predictions, chosen: Mapping[str, str]
) -> dict[str, float]:
    """Return how accuracies differ on the questions that both networks answered.

    `paired/<task>/<metric>/…`: `difference`, of the other's accuracy minus the original's, with
    `difference_stderr`; `lost` and `won`, answers that were right and are wrong, and the other way
    round. `paired/<task>/n`: the questions. `zeroshot_mean/difference` with `_stderr`: of tasks.
    chosen: by task, the accuracy that enters this mean (`accuracy_of_mean`).
    """
    found: dict[str, float] = {}
    of_mean = []
    for task, before, after in _pairs(original, other):
        found[f"paired/{task}/n"] = len(before)
        for metric in (m for m in ACCURACIES if m in before[0]):
            d = _rights(after, metric) - _rights(before, metric)
            place = f"paired/{task}/{metric}"
            found |= {
                f"{place}/difference": float(d.mean()),
                f"{place}/difference_stderr": _error(d),
                f"{place}/lost": int((d < 0).sum()),
                f"{place}/won": int((d > 0).sum()),
            }
            if metric == _metric(task, before, chosen):
                of_mean.append(d)
    if of_mean:
        mean, error = _mean_of_means(of_mean)
        found["zeroshot_mean/difference"] = mean
        found["zeroshot_mean/difference_stderr"] = error
    return found


def _pairs(original: Predictions, other: Predictions) -> Iterator[tuple[str, Answers, Answers]]:
    """Yield tasks with the answers to the same questions; say where some have no partner."""
    for task in (task for task in original if task in other):
        ours, theirs = _by_question(original[task]), _by_question(other[task])
        same = [question for question in ours if question in theirs]
        if not len(same) == len(ours) == len(theirs):
            counts = len(same), task, len(ours), len(theirs)
            log.warning("%d questions of %s are compared: one has %d, the other %d", *counts)
        if len(same) > 1:  # one question has no standard error
            yield task, [ours[q] for q in same], [theirs[q] for q in same]


def _by_question(answers: Answers) -> dict[tuple[str, int], dict[str, Any]]:
    """Return answers by what was asked; the same question asked again has the next number."""
    seen: dict[str, int] = {}
    found = {}
    for answer in answers:
        digest = answer["digest"]
        found[digest, seen.setdefault(digest, 0)] = answer
        seen[digest] += 1
    return found


def _metric(task: str, answers: Answers, chosen: Mapping[str, str]) -> str:
    metric = accuracy_of_mean(task, chosen, answers[0])
    assert metric is not None, f"{task} has no {chosen[task]}, and was asked all the same"
    return metric


def _rights(answers: Answers, metric: str) -> np.ndarray:
    return np.array([answer[metric]["right"] for answer in answers], dtype=float)


def _error(values: np.ndarray) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _mean_of_means(tasks: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the mean of tasks' means, with its standard error: variances add up over tasks²."""
    means = [values.mean() for values in tasks]
    errors = [_error(values) for values in tasks]
    return float(np.mean(means)), float(np.sqrt(np.sum(np.square(errors))) / len(tasks))
