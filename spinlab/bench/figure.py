"""Figures of benchmarks: ratios as bars, one group for each kind."""

from collections.abc import Mapping
from pathlib import Path

_KINDS = ("speedup/", "peer/best/", "ratio/")
_BAR = 0.24  # inches


def draw_ratios(metrics: Mapping[str, float], title: str, path: Path) -> bool:
    """Draw every ratio of a record with a line at 1; return False where there is nothing to draw.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [{n: v for n, v in metrics.items() if n.startswith(kind)} for kind in _KINDS]
    groups = [group for group in groups if group]
    if not groups:
        return False
    counts = [len(group) for group in groups]
    height = _BAR * sum(counts) + 0.6 * len(counts) + 0.4
    figure = Figure(figsize=(7, height), layout="constrained", dpi=75)
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axis, group in zip(axes, groups, strict=True):
        names = sorted(group, reverse=True)
        axis.barh(names, [group[name] for name in names], color="#4063a3", height=0.7)
        for place, name in enumerate(names):
            axis.text(group[name], place, f" {group[name]:.2f}", va="center", size=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1, y=0.01)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
    return True
