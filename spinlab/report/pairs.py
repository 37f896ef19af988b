"""Records of two methods, paired by their seeds, and what log perplexities of pairs say."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev

from spinlab.errors import InputError, did_you_mean
from spinlab.report.records import Record


def runs_of(method: str, records: Mapping[str, list[Record]]) -> list[Record]:
    """Return the records of a method. Raises InputError, with the nearest name, for none."""
    if method not in records:
        raise InputError(f"no record is of {method!r}: {did_you_mean(method, [*records])}")
    return records[method]


def gap_closed(method: Sequence[Record], baseline: Sequence[Record], text: str) -> list[float]:
    """Return, seed by seed, the share of the way from the baseline to the original.

    (log b - log m) / (log b - log o), for perplexities of the baseline, the method and the
    original on a text. Raises InputError as `_pairs`.
    """
    found = []
    for record, other in _pairs(method, baseline, text):
        ours, theirs = _log(record, text), _log(other, text)
        found.append((theirs - ours) / (theirs - _log(record, text, "fp")))
    return found


def log_differences(method: Sequence[Record], base: Sequence[Record], text: str) -> list[float]:
    """Return, seed by seed, log m - log b for perplexities of a method and of a base, in nats.

    Raises InputError as `_pairs`.
    """
    return [_log(ours, text) - _log(theirs, text) for ours, theirs in _pairs(method, base, text)]


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean over seeds; a single one has none."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _log(record: Record, text: str, variant: str = "fake") -> float:
    return math.log(record["metrics"][f"ppl/{text}/{variant}"])


def _pairs(
    method: Sequence[Record], baseline: Sequence[Record], text: str
) -> Iterator[tuple[Record, Record]]:
    """Yield the records of a method, each with the baseline's of its seed.

    Raises InputError for a seed of the method that the baseline does not have, and for records of
    other models or texts.
    """
    of_seed = {record["config"]["seed"]: record for record in baseline}
    for record in method:
        if (seed := record["config"]["seed"]) not in of_seed:
            seeds = ", ".join(map(str, of_seed))
            against = baseline[0]["experiment"]
            raise InputError(f"seed {seed} has no record of {against}, which has {seeds}")
        _check_pair(record, of_seed[seed], text)
        yield record, of_seed[seed]


def _check_pair(record: Record, other: Record, text: str) -> None:
    """Raise InputError for records of two models, and of texts that one of them lacks."""
    names = [r["config"].get("model", {}).get("name") for r in (record, other)]
    if names[0] != names[1]:
        raise InputError(
            f"records are of two models, {names[0]} and {names[1]}: name the folder of one"
        )
    for one in (record, other):
        if f"ppl/{text}/fake" not in one["metrics"]:
            raise InputError(
                f"a record of {one['experiment']} has no perplexity of {text}, which others have: "
                "a folder's records must be of the same texts"
            )
