"""The spread of a metric over seeds, as boxes."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.figures.groups import axis_label, group_of, grouped, records_in
from spinlab.report.figures.style import PAGE, Drawing, blank, scale_for, series, style
from spinlab.report.records import Record

log = logging.getLogger(__name__)


def seed_variance(records: str, metric: str = "ppl/wiki/fake", by: str = "rotation.r1") -> Drawing:
    """Draw a metric of the records below a folder, a box for each value of a setting.

    metric: several with commas, of one text and several networks, have a box each, of the records
    that measured it. Raises InputError for several that are not.
    """
    found, metrics = records_in(records), [name.strip() for name in metric.split(",")]
    if len({name.rpartition("/")[0] for name in metrics}) > 1 or len({*metrics}) < len(metrics):
        raise InputError(
            f"metric={metric}: several must be of one text and different networks, as in "
            "metric=ppl/wiki/init,ppl/wiki/fake"
        )
    _warn_of_repeats(found, by)
    boxes: dict[str, list[float]] = {}
    for name in metrics:
        having = {path: r for path, r in found.items() if name in r["metrics"]}
        network = f", {name.rpartition('/')[2]}" if metrics[1:] else ""
        for group, rows in grouped(having if metrics[1:] else found, by, name).items():
            boxes[f"{group}{network}"] = [value for (value,) in rows]
    return draw_spread(boxes, axis_label(metrics[0]))


def _warn_of_repeats(records: Mapping[Path, Record], by: str) -> None:
    """Say so where a box would hold more than one run of a seed, which differ in something else."""
    seeds = Counter(
        (group_of(record, by.split(",")), record["config"].get("seed"))
        for record in records.values()
    )
    group, seed = max(seeds, key=lambda key: seeds[key])
    if (count := seeds[group, seed]) > 1:
        log.warning(
            "%d runs of by=%s, %s, have the seed %s: they differ in more than that; give by= what "
            "they differ in, or the folders of one sweep's runs",
            *(count, by, group, seed),
        )


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
