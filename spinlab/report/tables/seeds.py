"""How much the seed of a rotation matters: spreads over many seeds, and what learning changes."""

from collections.abc import Sequence
from pathlib import Path

from spinlab.config import VARIANTS
from spinlab.report.averaged import read_seeds
from spinlab.report.formats import Sheet, spread
from spinlab.report.records import Record, texts_of
from spinlab.report.tables.methods import in_order, titles_of


def seeds_table(folder: Path) -> str:
    """Return `seeds_sheet` in Markdown."""
    return seeds_sheet(folder).markdown()


def seeds_sheet(folder: Path) -> Sheet:
    """Return a table of the records `<start>_seed<N>.json`: a row per start and quantized network.

    Perplexities are mean ± sample standard deviation over seeds, with the least and the greatest.
    `change` is that of a seed's perplexity from before learning (`init`) in percent, mean and
    deviation of these differences.
    """
    records, titles = read_seeds(folder), titles_of(folder)
    texts = texts_of(next(iter(records.values()))[0]["metrics"])
    of_texts = [f"{text} {title}" for text in texts for title in ("ppl", "range", "change")]
    rows = [["rotation", "network", "seeds", *of_texts]]
    for start in in_order(records, titles):
        runs = records[start]
        for variant in VARIANTS[1:]:
            if all(f"ppl/{text}/{variant}" in run["metrics"] for run in runs for text in texts):
                cells = [cell for text in texts for cell in _cells(runs, text, variant)]
                rows.append([titles.get(start, start), variant, str(len(runs)), *cells])
    return Sheet(rows)


def _cells(runs: Sequence[Record], text: str, variant: str) -> list[str]:
    """Return mean and spread, the extremes, and the change from before learning."""
    values = [run["metrics"][f"ppl/{text}/{variant}"] for run in runs]
    before = [run["metrics"].get(f"ppl/{text}/init") for run in runs]
    change = ""
    if variant != "init" and None not in before:
        pairs = zip(values, before, strict=True)
        change = f"{spread([100 * (value / start - 1) for value, start in pairs], 1)} %"
    return [spread(values), f"{min(values):.2f}–{max(values):.2f}", change]
