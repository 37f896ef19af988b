"""What single choices change: differences from a base, paired by seed, as points with errors."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean

from spinlab.errors import InputError
from spinlab.report.averaged import read_seeds
from spinlab.report.figures.style import PAGE, Drawing, blank, series, style
from spinlab.report.pairs import log_differences, runs_of, standard_error
from spinlab.report.records import texts_of

_ROW = 0.19  # inches


def ablation(records: str, methods: str) -> Drawing:
    """Draw how far log perplexity of each text moves from a base, for records of one folder.

    methods: the base, then the choices in their order. Raises InputError for no choice, and as
    `log_differences`.
    """
    base, *choices = methods.split(",")
    if not choices:
        raise InputError(f"methods={methods} is a base alone: write methods=BASE,CHOICE,...")
    found = read_seeds(Path(records).expanduser())
    against = runs_of(base, found)
    moved = {
        text: {choice: log_differences(runs_of(choice, found), against, text) for choice in choices}
        for text in texts_of(against[0]["metrics"])
    }
    return draw_differences(moved, base)


@style()
def draw_differences(moved: Mapping[str, Mapping[str, Sequence[float]]], base: str) -> Drawing:
    """Draw differences (by text and choice, one for each seed), a panel for each text.

    A point is their mean and its bar one standard error to each side; a single seed has no bar.
    """
    choices = list(next(iter(moved.values())))
    figure = blank(PAGE, 0.8 + _ROW * len(choices))
    axes = figure.subplots(1, len(moved), sharex=True, sharey=True, squeeze=False)[0]
    for number, (axis, (text, found)) in enumerate(zip(axes, moved.items(), strict=True)):
        looks = series(number)
        errors = [standard_error(values) for values in found.values()]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.errorbar(
            [mean(values) for values in found.values()], range(len(choices)),
            xerr=[nan if error is None else error for error in errors],
            linestyle="", marker=looks.marker, color=looks.colour, elinewidth=1, capsize=2,
        )  # fmt: skip
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(text)
    axes[0].set_yticks(range(len(choices)), choices)
    axes[0].invert_yaxis()  # of all: they share it
    figure.supxlabel(f"log perplexity, less that of {base}", fontsize=8)
    return Drawing(figure)
