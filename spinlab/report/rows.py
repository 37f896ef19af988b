"""Our records of a published row: found by the settings that its command composes to.

A record belongs to a row if it was made with the row's settings and measured as the row was. One
that was measured otherwise, on another text, in other windows, on other questions, is near it and
never compared; what differs is named.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from spinlab.compose import composed, options_of
from spinlab.config import Config, plain
from spinlab.config.values import text, values_of
from spinlab.report.publications import Measure, Row, Table
from spinlab.report.records import TWINS, Record, zeroshot_mean
from spinlab.report.settings import by_effect, settings_of, stands_in

# settings that say where, how fast and for whom, but change no number beyond noise
_FREE = (
    *("name", "seed", "runtime", "tracker", "paths", "export", "sweep", "eval"),
    *("data.evaluation", "data.held_out"),
    *("model.hub", "model.path", "model.package", "model.file", "model.revision", "model.name"),
    *("model.architecture", "model.outlier_channels", "model.outlier_scale"),
    *("learn.micro_batch", "learn.checkpoint", "learn.shard", "learn.save_every"),
)
# settings that make a row what it is: with others a record belongs to another row
_OF_THE_ROW = ("quant", "kv", "rotation", "weights.method", "learn.quantize_weights")
_SIZES = {  # of a model as its record tells them -> in the architecture of its preset
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}


def command(table: Table, row: Row, model: str) -> str:
    """Return the command that makes our side of a row; empty where there is none."""
    return shlex.join(("spinlab", *_words(table, row, model))) if row.ours else ""


def _words(table: Table, row: Row, model: str) -> tuple[str, ...]:
    words = (*table.ours, *row.ours)
    if any(word.startswith("+experiment=") for word in words):
        return words
    return ("+experiment=paper", f"model={model}", *words)


def has_preset(model: str) -> bool:
    """Tell whether a command can name this model."""
    return model in options_of("model")


def row_config(table: Table, row: Row, model: str) -> Config:
    """Return the settings of a row's command.

    Composing takes long: model and suite are exchanged in what the other words compose to.
    """
    words = _words(table, row, model)
    free = any(word.startswith("eval.") for word in words)  # which may be needed to compose
    chosen = {
        part: word
        for word in words
        if (part := word.partition("=")[0]) == "model" or (part == "eval" and not free)
    }
    config = _composed(tuple(word for word in words if word not in chosen.values()))
    parts = {part: getattr(_composed((word,)), part) for part, word in chosen.items()}
    return replace(config, **parts)


@cache
def _composed(words: tuple[str, ...]) -> Config:
    return composed(*words)


def value_of(record: Record, config: Config, row: Row, measure: Measure) -> float | None:
    """Return a record's number for a measure, in percent if it is an accuracy."""
    metrics, asked = record["metrics"], config.eval
    if measure.metric == "zeroshot":
        return zeroshot_mean(metrics, asked.tasks, asked.task_metrics, row.variant)
    values = (metrics.get(f"{measure.metric}/{v}") for v in TWINS.get(row.variant, (row.variant,)))
    return next((value for value in values if value is not None), None)


def is_of_model(record: Record, config: Config) -> bool:
    """Tell whether a record is about a model: by name or origin, and by its sizes.

    A local folder is taken for the model that its name, or `model.name=`, says it is.
    """
    recorded, wanted = record["config"].get("model", {}), config.model
    if wanted.path:  # what an earlier run has left
        return record["experiment"] == config.name
    source = record.get("model", {}).get("source", {})
    named = recorded.get("name") == wanted.name
    folder = (recorded.get("path") or "").lower() == (wanted.hub or "").rpartition("/")[2].lower()
    from_hub = bool(wanted.hub) and wanted.hub in source.values()
    if recorded.get("weights") == "random" or not (named or from_hub or (wanted.hub and folder)):
        return False
    sizes = record.get("model", {})
    known = wanted.architecture if wanted.hub else {}
    return all(
        sizes.get(ours, known.get(theirs)) == known.get(theirs, sizes.get(ours))
        for ours, theirs in _SIZES.items()
    )


def differences(record: Record, config: Config, row: Row, measure: Measure) -> list[str]:
    """Say in what a record was made or measured otherwise than a row: `name=value`, its own."""
    recorded = settings_of(record)
    found = list(_measured_otherwise(record["config"], config, measure))
    if row.variant == "fp":  # of the original only what it is measured on
        return found
    own = ("method", "clip", config.weights.method)
    unread = tuple(f"weights.{part}" for part in vars(config.weights) if part not in own)
    for name, value in by_effect(values_of(plain(config))).items():
        if stands_in(name, unread):
            continue
        if not stands_in(name, _FREE) and (told := recorded.get(name, "missing")) != value:
            found.append(f"{name}={text(told)}")
    return found


def is_near(differing: list[str]) -> bool:
    """Tell whether a record is of a row, though it must not be compared with it."""
    return not any(stands_in(one.partition("=")[0], _OF_THE_ROW) for one in differing)


def _measured_otherwise(
    recorded: Mapping[str, Any], config: Config, measure: Measure
) -> Iterator[str]:
    asked = recorded.get("eval", {})
    kind, _, label = measure.metric.partition("/")
    if kind == "ppl":
        data = recorded.get("data", {})
        if label not in data.get("evaluation", []):
            yield f"data.evaluation={text(data.get('evaluation', []))}"
        if (held_out := data.get("held_out", config.data.held_out)) != config.data.held_out:
            yield f"data.held_out={held_out}"
        names = ("window", "max_windows")
    else:
        if missing := [task for task in config.eval.tasks if task not in asked.get("tasks", [])]:
            yield f"eval.tasks without {', '.join(missing)}"
        names = ("limit",)
    for name in names:
        if asked.get(name) != getattr(config.eval, name):
            yield f"eval.{name}={text(asked.get(name))}"
