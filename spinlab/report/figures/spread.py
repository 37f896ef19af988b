"""The spread of a metric over seeds, as boxes."""

from collections.abc import Mapping, Sequence

from spinlab.report.figures.groups import axis_label, grouped, records_in
from spinlab.report.figures.style import PAGE, Drawing, blank, scale_for, series, style


def seed_variance(records: str, metric: str = "ppl/wiki/fake", by: str = "rotation.r1") -> Drawing:
    """Draw a metric of the records below a folder, a box for each value of a setting.

    metric: several with commas, of one text and several networks, have a box each, of the records
    that measured it.
    """
    found, metrics = records_in(records), metric.split(",")
    boxes: dict[str, list[float]] = {}
    for name in metrics:
        having = {path: r for path, r in found.items() if name in r["metrics"]}
        network = f", {name.rpartition('/')[2]}" if metrics[1:] else ""
        for group, rows in grouped(having if metrics[1:] else found, by, name).items():
            boxes[f"{group}{network}"] = [value for (value,) in rows]
    return draw_spread(boxes, axis_label(metrics[0]))


@style()
def draw_spread(groups: Mapping[str, Sequence[float]], label: str) -> Drawing:
    """Draw a box (quartiles, median, whiskers to the extremes) and the points of each group."""
    figure = blank(min(PAGE, 1.2 + 0.9 * len(groups)), 2.6)
    axis = figure.subplots()
    places = range(1, len(groups) + 1)
    boxes = axis.boxplot(
        [list(values) for values in groups.values()], positions=list(places), whis=(0, 100),
        widths=0.5, showfliers=False, patch_artist=True, medianprops={"color": "black"},
        manage_ticks=False,
    )  # fmt: skip
    for place, box, values in zip(places, boxes["boxes"], groups.values(), strict=True):
        looks = series(place - 1)
        box.set(facecolor="white", edgecolor=looks.colour, hatch=looks.hatch)
        axis.plot(
            [place] * len(values), values, linestyle="", marker=looks.marker, color=looks.colour,
            alpha=0.8,
        )  # fmt: skip
    titles = [f"{name}\nn = {len(values)}" for name, values in groups.items()]
    axis.set_xticks(list(places), titles)
    axis.set_xlim(0.4, len(groups) + 0.6)
    axis.set(ylabel=label, yscale=scale_for(v for values in groups.values() for v in values))
    return Drawing(figure)
