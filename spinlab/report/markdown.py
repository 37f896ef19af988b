"""Tables and numbers in Markdown."""

from statistics import mean, stdev

MISSING = "—"  # a cell whose number the record does not have


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table of equally wide columns; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def spread(values: list[float], digits: int = 2) -> str:
    """Format mean ± sample standard deviation; one value, or the same in every run, has none."""
    if len(set(values)) == 1:
        return _number(values[0], digits)
    return f"{_number(mean(values), digits)} ± {_number(stdev(values), digits)}"


def percent(value: float, error: float) -> str:
    """Format a fraction and its standard error in percent."""
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.0f}"
