"""The table of one record: what each variant of the network costs and scores."""

from collections.abc import Mapping
from pathlib import Path

from spinlab.config import VARIANTS
from spinlab.report.markdown import markdown
from spinlab.report.records import read_record, texts_of

_TITLES = {
    "fp": "original",
    "rtn": "no rotation",
    "init": "before learning",
    "fake": "the method, emulated in floats",
    "integer": "the method, on integer kernels",
}


def record_table(path: Path) -> str:
    """Return the table of a record's file."""
    return result_table(read_record(path)["metrics"])


def result_table(metrics: Mapping[str, float]) -> str:
    """Return a Markdown table with one row per variant that was measured."""
    columns = _columns(metrics)
    rows = [["variant", "network", *columns]]
    for variant in VARIANTS:
        cells = [_cell(metrics, name, variant) for name in columns.values()]
        if any(cells):
            rows.append([variant, _TITLES[variant], *cells])
    return markdown(rows)


def _columns(metrics: Mapping[str, float]) -> dict[str, str]:
    """Map column titles to metric prefixes, in the order: perplexity, zero-shot, bytes."""
    tasks = sorted({k.split("/")[1] for k in metrics if k.startswith("zeroshot/")})
    columns = {f"{text} ppl": f"ppl/{text}" for text in texts_of(metrics)}
    columns |= {task: f"zeroshot/{task}" for task in tasks}
    return {**columns, "MiB": "bytes", "bits": "bits/weights"}


def _cell(metrics: Mapping[str, float], name: str, variant: str) -> str:
    if name.startswith("zeroshot/"):
        return _accuracy(metrics, name, variant)
    value = metrics.get(f"{name}/{variant}")
    if value is None:
        return ""
    return f"{value / 2**20:.0f}" if name == "bytes" else f"{value:.2f}"


def _accuracy(metrics: Mapping[str, float], name: str, variant: str) -> str:
    """Format acc_norm where the task has it, else acc, in percent with its standard error."""
    for kind in ("acc_norm", "acc"):
        value = metrics.get(f"{name}/{kind}/{variant}")
        if value is not None:
            error = metrics.get(f"{name}/{kind}_stderr/{variant}", 0.0)
            return f"{100 * value:.1f} ± {100 * error:.1f}"
    return ""
