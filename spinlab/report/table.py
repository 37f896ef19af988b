"""The table of one record: what each variant of the network costs and scores."""

from collections.abc import Mapping

from spinlab.config import VARIANTS

_TITLES = {
    "fp": "original",
    "rtn": "no rotation",
    "init": "before learning",
    "fake": "the method, emulated in floats",
    "int4": "the method, on integer kernels",
}


def result_table(metrics: Mapping[str, float]) -> str:
    """Return a Markdown table with one row per variant that was measured."""
    columns = _columns(metrics)
    rows = [["variant", "network", *columns]]
    for variant in VARIANTS:
        cells = [_cell(metrics, name, variant) for name in columns.values()]
        if any(cells):
            rows.append([variant, _TITLES[variant], *cells])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table of equally wide columns; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _columns(metrics: Mapping[str, float]) -> dict[str, str]:
    """Map column titles to metric prefixes, in the order: perplexity, zero-shot, bytes."""
    texts = sorted({k.split("/")[1] for k in metrics if k.startswith("ppl/")}, reverse=True)
    tasks = sorted({k.split("/")[1] for k in metrics if k.startswith("zeroshot/")})
    columns = {f"{text} ppl": f"ppl/{text}" for text in texts}
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
