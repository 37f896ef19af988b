"""How much of what quantization costs a method wins back: fractions of a log-perplexity gap."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spinlab.errors import InputError, did_you_mean
from spinlab.files import write_json
from spinlab.report.formats import Sheet
from spinlab.report.records import Record, read_seeds, texts_of
from spinlab.report.tables.methods import perplexities, titles_of
from spinlab.rotation.hadamard import has_hadamard

_ONLINE = {
    **{"r3": "R3", "r4": "R4", "cross_head": "across heads"},
    **{"duquant": "dual transforms", "blocks": "blocks", "wush": "maps in blocks"},
}


def gap_table(folder: Path, baseline: str, *methods: str) -> str:
    """Return `gap_sheet` in Markdown."""
    return gap_sheet(folder, baseline, *methods).markdown()


def gap_sheet(folder: Path, baseline: str, *methods: str) -> Sheet:
    """Return a table of methods: what runs online, and what each closes of a baseline's gap."""
    records, titles = read_seeds(folder), titles_of(folder)
    runs = runs_of(baseline, records)
    texts = texts_of(runs[0]["metrics"])
    of_texts = [*(f"{t} ppl" for t in texts), *(f"{t} gap" for t in texts)]
    rows = [["method", "transform", "online", *of_texts]]
    rows.append(["", "original", "", *perplexities(runs, texts, "fp"), *("" for _ in texts)])
    for method in (baseline, *methods):
        found = runs_of(method, records)
        cells = [method, titles.get(method, ""), _online(found[0])]
        shares = [mean(gap_closed(found, runs, text)) for text in texts]
        closed = [f"{100 * share:.0f} %" if method != baseline else "" for share in shares]
        rows.append([*cells, *perplexities(found, texts, "fake"), *closed])
    return Sheet(rows)


def _online(record: Record) -> str:
    """Say what a network runs beside its linears, by the settings of its rotations."""
    rotation: Mapping[str, Any] = record["config"]["rotation"]
    if not rotation["online"]:
        return "nothing"
    names = ("r3", "r4", *(("cross_head",) if has_hadamard(record["model"]["heads"]) else ()))
    off = {"r3": ("none",)}  # an identity is there to be learned
    online = (n for n in names if rotation[n] not in off.get(n, ("none", "identity")))
    found = [_ONLINE[name] for name in online]
    found += [_ONLINE[rotation["inputs"]]] if rotation["inputs"] in _ONLINE else []
    return ", ".join(found) or "nothing"


def runs_of(method: str, records: Mapping[str, list[Record]]) -> list[Record]:
    """Return the records of a method. Raises InputError, with the nearest name, for none."""
    if method not in records:
        raise InputError(f"no record is of {method!r}: {did_you_mean(method, [*records])}")
    return records[method]


def gap_closed(method: Sequence[Record], baseline: Sequence[Record], text: str) -> list[float]:
    """Return, seed by seed, the share of the way from the baseline to the original.

    (log b - log m) / (log b - log o), for perplexities of the baseline, the method and the
    original on a text. Records are paired by seed. Raises InputError for a seed of the method that
    the baseline does not have, and for records of other models or texts.
    """
    found = []
    of_seed = {record["config"]["seed"]: record for record in baseline}
    for record in method:
        if (seed := record["config"]["seed"]) not in of_seed:
            seeds = ", ".join(map(str, of_seed))
            raise InputError(f"seed {seed} has no record of the baseline: that has {seeds}")
        _check_pair(record, other := of_seed[seed], text)
        ours, theirs = (math.log(r["metrics"][f"ppl/{text}/fake"]) for r in (record, other))
        original = math.log(record["metrics"][f"ppl/{text}/fp"])
        found.append((theirs - ours) / (theirs - original))
    return found


def _check_pair(record: Record, other: Record, text: str) -> None:
    """Raise InputError for records of two models, and of texts that one of them lacks."""
    names = [r["config"].get("model", {}).get("name") for r in (record, other)]
    if names[0] != names[1]:
        raise InputError(
            f"a gap is that of one model, and records are of {names[0]} and {names[1]}: name the "
            "folder of one"
        )
    for one in (record, other):
        if f"ppl/{text}/fake" not in one["metrics"]:
            raise InputError(
                f"a record of {one['experiment']} has no perplexity of {text}, which others have: "
                "a folder's records must be of the same texts"
            )


def gap_summary(folder: Path, name: str, baseline: str, method: str) -> Path:
    """Write what a method closes of a baseline's gap, with the records behind it.

    name: of a file, from where the folder lies. Returns its path. Raises InputError for a method of
    a single seed.
    """
    records = read_seeds(folder)
    runs = {name: runs_of(name, records) for name in (method, baseline)}
    if len(runs[method]) < 2:
        raise InputError(f"{method} has one seed, which has no deviation: run it with another")
    metrics: dict[str, float] = {}
    for text in texts_of(runs[method][0]["metrics"]):
        shares = gap_closed(runs[method], runs[baseline], text)
        metrics[f"quality/gap_closed/{text}"] = mean(shares)
        metrics[f"quality/gap_closed/{text}/deviation"] = stdev(shares)
    path = (folder.parent / name).resolve()
    if not folder.resolve().is_relative_to(path.parent):
        raise InputError(f"{path} does not lie above {folder}, whose records it names")
    place = folder.resolve().relative_to(path.parent)
    names = [
        f"{place.as_posix()}/{name}_seed{record['config']['seed']}.json"
        for name, of_method in runs.items()
        for record in of_method
    ]
    write_json(path, {"schema": 1, "method": method, "metrics": metrics, "records": names})
    return path
