"""Records of a folder as points of a figure, in groups that a setting makes."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.config.values import text, values_of
from spinlab.errors import InputError
from spinlab.report.records import Record, folders_of, read_below

log = logging.getLogger(__name__)


def records_in(places: str) -> dict[Path, Record]:
    """Return the records below folders, with commas between these.

    What is broken or unfinished is left out, with a warning. Raises InputError where no record is.
    """
    kept = read_below(*folders_of(places)).kept
    if not kept:
        raise InputError(f"records={places} holds no complete record")
    return kept


def grouped(
    records: Mapping[Path, Record], by: str, *metrics: str
) -> dict[str, list[tuple[float, ...]]]:
    """Return per group the metrics of its records, in the order of names.

    by: settings with commas, like rotation.r1, or `experiment`. A record without one of the metrics
    is left out, with a warning. Raises InputError where a setting does not exist, or all are out.
    """
    found: dict[str, list[tuple[float, ...]]] = {}
    for path, record in records.items():
        values = [record["metrics"].get(name) for name in metrics]
        if None in values:
            log.warning("%s is left out: no %s", path, metrics[values.index(None)])
            continue
        numbers = tuple(float(value) for value in values if value is not None)
        found.setdefault(group_of(record, by.split(",")), []).append(numbers)
    if not found:
        raise InputError(f"no record has the metrics {', '.join(metrics)}")
    return dict(sorted(found.items()))


def group_of(record: Record, names: Sequence[str]) -> str:
    """Return the values of settings in a record, in words."""
    settings = values_of(record["config"])
    settings["experiment"] = str(record["experiment"]).rpartition("/")[2]
    if unknown := [name for name in names if name not in settings]:
        raise InputError(f"by={unknown[0]} is no setting of the records: give one like rotation.r1")
    return ", ".join(text(settings[name]) for name in names)


def axis_label(metric: str) -> str:
    """Return what an axis says of a metric: ppl/wiki/fake is `wiki perplexity`."""
    kind, *rest = metric.split("/")
    kinds = {"ppl": "perplexity", "kl": "KL divergence to the original", "zeroshot": "accuracy"}
    return f"{' '.join(rest[:-1])} {kinds[kind]}" if kind in kinds and rest[:-1] else metric
