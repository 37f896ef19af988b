"""What quality costs: a metric against effective bits, and against measured speed."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from spinlab.errors import InputError
from spinlab.report.figures.groups import axis_label, grouped, records_in
from spinlab.report.figures.style import COLUMN, Drawing, blank, fill, scale_for, series, style
from spinlab.report.records import read_benchmark

Points = Mapping[str, Sequence[tuple[float, ...]]]

_ENDS = ("", "/seconds_per_token")  # of a timing's name, in seconds


def bits(records: str, metric: str = "ppl/wiki/fake", by: str = "experiment") -> Drawing:
    """Draw a metric against the effective bits of the weights, a series for each group."""
    variant = metric.rpartition("/")[2]
    groups = grouped(records_in(records), by, f"bits/weights/{variant}", metric)
    return draw_points(groups, "effective bits per weight", axis_label(metric))


def speed(
    records: str,
    bench: str,
    case: str = "cpu/decode",
    metric: str = "ppl/wiki",
    pairs: str = "fp:fp32,fake:int4_kv4",
    by: str = "experiment",
) -> Drawing:
    """Draw a metric against measured speed, relative to that of the first pair.

    bench: a record of timings; case: what was timed there; metric: without its variant; pairs: each
    variant with the name that it was timed under. Raises InputError where the timings are those of
    another model, or lack one of these names.
    """
    kept = records_in(records)
    timings = _read_timings(bench, {r["config"]["model"]["name"] for r in kept.values()})
    named = [pair.partition(":")[::2] for pair in pairs.split(",")]
    seconds = {variant: _seconds(timings, bench, f"{case}/{name}") for variant, name in named}
    start = next(iter(seconds.values()))
    points: dict[str, list[tuple[float, ...]]] = {}
    for variant, taken in seconds.items():
        groups = grouped(kept, by, f"{metric}/{variant}")
        if variant == "fp":  # the same network, whatever the method
            groups = {"original": [(mean(v for rows in groups.values() for (v,) in rows),)]}
        for name, rows in groups.items():
            points.setdefault(name, []).extend((start / taken, value) for (value,) in rows)
    return draw_points(points, f"speed of {case}, relative", axis_label(f"{metric}/"))


def _read_timings(bench: str, models: set[str]) -> Mapping[str, Any]:
    """Return the metrics of a benchmark; raise InputError if it timed another model."""
    record = read_benchmark("bench", bench)
    configs = [part.get("config", {}) for part in (record, *record.get("parts", ()))]
    timed = {config["model"] for config in configs if isinstance(config.get("model"), str)}
    if not timed & models:
        told = ", ".join(sorted(timed)) or "no model"
        raise InputError(
            f"bench={bench} timed {told}, and the records are of {', '.join(sorted(models))}: "
            "quality and speed must be of one model"
        )
    return record["metrics"]


def _seconds(metrics: Mapping[str, Any], bench: str, name: str) -> float:
    for end in _ENDS:
        if (value := metrics.get(f"speed/{name}{end}")) is not None:
            return value
    known = ", ".join(sorted(n for n in metrics if n.startswith("speed/"))[:6])
    raise InputError(f"bench={bench} has no speed/{name}; there are {known}, ...")


@style()
def draw_points(groups: Points, x: str, y: str) -> Drawing:
    """Draw points (x, y), a series for each group, with the names of the axes."""
    figure = blank(1.6 * COLUMN, 2.8)
    axis = figure.subplots()
    for number, (name, points) in enumerate(groups.items()):
        looks = series(number)
        axis.plot(
            *zip(*points, strict=True), linestyle="", marker=looks.marker, color=looks.colour,
            label=name, fillstyle=fill(number),
        )  # fmt: skip
    heights = (point[1] for points in groups.values() for point in points)
    axis.set(xlabel=x, ylabel=y, yscale=scale_for(heights))
    axis.margins(0.1)
    figure.legend(loc="outside right upper")
    return Drawing(figure)
