"""Tables and numbers as text: Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

MISSING = "—"  # a cell whose number the record does not have
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"\textdagger{}",
    "−": "$-$",
    "—": "---",
}


@dataclass(frozen=True)
class Sheet:
    """A table's rows, the first of which is its head, and what is said below it."""

    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the table in Markdown, its notes as a list."""
        notes = "".join(f"\n- {note}" for note in self.notes)
        return markdown(self.rows) + (f"\n{notes}" if notes else "")

    def latex(self) -> str:
        """Return a `tabular` environment, its notes as comments."""
        head, *body = [" & ".join(map(_in_latex, row)) + r" \\" for row in self.rows]
        columns = "l" * len(self.rows[0])
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline"]
        return "\n".join([*lines, r"\end{tabular}", *(f"% {note}" for note in self.notes)])

    def csv(self) -> str:
        """Return comma-separated values, without the notes."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(self.rows)
        return file.getvalue().rstrip("\n")


FORMATS: Mapping[str, Callable[[Sheet], str]] = {
    "markdown": Sheet.markdown,
    "latex": Sheet.latex,
    "csv": Sheet.csv,
}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of equally wide columns; the first row is its head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def number(value: float | None) -> str:
    """Format a metric to six digits; nothing where there is none."""
    return "" if value is None else f"{value:.6g}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± sample standard deviation; one value, or the same in every run, has none."""
    if len(set(values)) == 1:
        return _number(values[0], digits)
    return f"{_number(mean(values), digits)} ± {_number(stdev(values), digits)}"


def percent(value: float, error: float) -> str:
    """Format a fraction and its standard error in percent."""
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _number(value: float, digits: int) -> str:
    value = round(value, digits) + 0.0  # a KL of noise is no -0.000
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.0f}"


def _in_latex(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)
