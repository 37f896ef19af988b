"""Codecs of the KV cache: what each takes, and what it does to a network, in a table and a file."""

from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import mean

from spinlab.errors import InputError, did_you_mean
from spinlab.files import write_json
from spinlab.report.averaged import read_seeds
from spinlab.report.cells import OF_TEXTS
from spinlab.report.formats import MISSING, Sheet, percent
from spinlab.report.records import Record, texts_of
from spinlab.report.settings import settings_of_today
from spinlab.report.tables.methods import columns_of, filled
from spinlab.report.tables.quality import mean_over, models_in
from spinlab.report.words import codec_words, kept_words, rotation_words

_BITS, _BYTES, _CODED = "bits/kv/fake", "bytes/kv/{}/fake", "coded/kv/fake"
_CONTEXTS = (4096, 32768)  # tokens of the sequences whose bytes are told
_MEASURED = ("ppl", "kl", "flips", "diverges", "attention_output")  # of each text


def kv_table(folder: Path) -> str:
    """Return `kv_sheet` in Markdown."""
    return kv_sheet(folder).markdown()


def kv_sheet(folder: Path) -> Sheet:
    """Return a table of one model's records: a row for every codec, with most bits first.

    Bits are those of a number of the cache at 4096 tokens, MiB those of a sequence; numbers of
    texts are mean ± sample standard deviation over seeds. Of needles the error is that of the share
    of all that were asked for. The share of the cache that is coded in the windows is a column
    where some codec leaves a part as it is. Raises InputError for a record without bits of a cache.
    """
    records = read_seeds(folder)
    every = [run for runs in records.values() for run in runs]
    columns = {t: make for t, make in columns_of(every).items() if t in _titles(every[0])}
    needles = sorted({int(n.split("/")[1]) for run in every for n in run["metrics"] if _asks(n)})
    coded = any(run["metrics"].get(_CODED, 1) < 0.9995 and _bits(run) < 16 for run in every)
    head = ["codec", "keys", "values", "in 16 bits", "rotation", "seeds", "bits"]
    head += [f"MiB, {tokens} tokens" for tokens in _CONTEXTS] + ["coded"] * coded
    rows = [[*head, *columns, *(f"needle {length}" for length in needles)]]
    blank = [""] * (len(head) - 2)
    originals = [*{run["config"].get("seed", 0): run for run in every}.values()]
    found = [*filled(columns, every, "fp"), *(_needle(originals, n, "fp") for n in needles)]
    rows.append(["", "original", *blank, *found])
    for name in sorted(records, key=lambda name: (-_bits(records[name][0]), name)):
        runs = records[name]
        cells = [name, *_told(runs[0]), str(len(runs)), *_taken(runs[0], coded)]
        found = [*filled(columns, runs, "fake"), *(_needle(runs, n, "fake") for n in needles)]
        rows.append([*cells, *found])
    return Sheet(rows)


def kv_summary(folder: Path, name: str, model: str) -> Path:
    """Write the means over seeds of a folder of models, each a folder of records, beside it.

    kl/<model>/<codec>/<text>: nats to the original, per token
    bits/<codec>, bytes/<codec>/4096, /32768: of a number of the cache and of a sequence, of the
    model that is named; others may have other heads and layers
    Returns the path of the file of that name. Raises InputError for a model without records.
    """
    found = {place.name: read_seeds(place) for place in models_in(folder)}
    if model not in found:
        raise InputError(f"{folder} has no records of {model!r}: {did_you_mean(model, [*found])}")
    metrics: dict[str, float] = {}
    for place, records in found.items():
        for codec, runs in records.items():
            for text in texts_of(runs[0]["metrics"]):
                metrics |= mean_over(runs, f"kl/{text}/fake", f"kl/{place}/{codec}/{text}")
    for codec, runs in found[model].items():
        metrics |= mean_over(runs, _BITS, f"bits/{codec}")
        for tokens in _CONTEXTS:
            metrics |= mean_over(runs, _BYTES.format(tokens), f"bytes/{codec}/{tokens}")
    path = folder.parent / name
    write_json(path, {"schema": 1, "model": model, "metrics": metrics})
    return path


def _titles(record: Record) -> list[str]:
    return [f"{t} {OF_TEXTS[kind][0]}" for kind in _MEASURED for t in texts_of(record["metrics"])]


def _bits(record: Record) -> float:
    if (bits := record["metrics"].get(_BITS)) is None:
        raise InputError(
            f"a record of {record['experiment']} has no {_BITS}: its network must be measured as "
            "`fake`, as +experiment=kv has it"
        )
    return bits


def _told(record: Record) -> list[str]:
    """Say what keys and values are coded with, what stays in 16 bits, what is turned."""
    settings = settings_of_today(record)
    keys, values = (codec_words(settings, side) for side in ("keys", "values"))
    if (queries := codec_words(settings, "queries")) != "16 bits":
        keys += f"; queries {queries}"
    return [keys, values, kept_words(settings), rotation_words(settings)]


def _taken(record: Record, coded: bool) -> list[str]:
    """Return bits, sizes, and the share that is coded where that is a column."""
    metrics = record["metrics"]
    sizes = [metrics.get(_BYTES.format(tokens)) for tokens in _CONTEXTS]
    share = metrics.get(_CODED)
    told = f"{100 * share:.1f}" if share is not None and _bits(record) < 16 else ""
    mib = (MISSING if size is None else f"{size / 2**20:.1f}" for size in sizes)
    return [f"{_bits(record):.2f}", *mib, *([told] if coded else [])]


def _asks(name: str) -> bool:
    return name.startswith("needle/")


def _needle(runs: Sequence[Record], length: int, variant: str) -> str:
    """Format the mean share of needles found, and its error: seeds ask for other needles."""
    names = (f"needle/{length}/{variant}", f"needle_stderr/{length}/{variant}")
    if not all(name in run["metrics"] for run in runs for name in names):
        return MISSING
    shares, errors = ([run["metrics"][name] for run in runs] for name in names)
    error = hypot(*errors) / len(errors)
    return percent(mean(shares), error) if error else f"{100 * mean(shares):.1f}"
