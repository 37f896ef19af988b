"""Layer by layer: how far outliers stand out, and how far quantization takes the stream away."""

from collections.abc import Mapping, Sequence

from spinlab.report.figures.outliers import TITLES
from spinlab.report.figures.runs import RunFolder
from spinlab.report.figures.style import PAGE, Drawing, blank, series, style

PerLayer = Mapping[str, Sequence[float]]


def layers(run: str) -> Drawing:
    """Draw what a run measured of each layer. run: its folder."""
    found = RunFolder(run).json("layers.json")
    outliers = {title: f"outliers/{name}" for name, title in TITLES.items()}
    errors = {n.removeprefix("error/"): v for n, v in found.items() if n.startswith("error/")}
    return draw_layers({t: found[name] for t, name in outliers.items() if name in found}, errors)


@style()
def draw_layers(outliers: PerLayer, errors: PerLayer) -> Drawing:
    """Draw outliers per network and errors per variant, each a number for every layer."""
    figure = blank(PAGE, 2.3)
    axes = figure.subplots(1, 2)
    labels = ("peak / rms of the attention input", "error of the stream, relative")
    for axis, lines, label in zip(axes, (outliers, errors), labels, strict=True):
        for number, (name, values) in enumerate(lines.items()):
            looks = series(number)
            axis.plot(
                range(len(values)), values, label=name, color=looks.colour, linestyle=looks.line,
                marker=looks.marker,
            )  # fmt: skip
        axis.set(xlabel="layer", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.locator_params(axis="x", integer=True)
        if lines:
            axis.legend()
    return Drawing(figure)
