"""What quality costs: a metric against effective bits, and against measured speed."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from spinlab.errors import InputError
from spinlab.report.figures.groups import axis_label, grouped, records_in
from spinlab.report.figures.style import (
    COLUMN,
    PAGE,
    Drawing,
    blank,
    fill,
    scale_for,
    series,
    style,
)
from spinlab.report.records import Record, read_benchmark

Points = Mapping[str, Sequence[tuple[float, ...]]]

_BITS = {"weights": "effective bits per weight", "kv": "bits per number of keys and values"}
_ENDS = ("", "/seconds_per_token")  # of a timing's name, in seconds


def bits(
    records: str, metric: str = "ppl/wiki/fake", by: str = "experiment", of: str = "weights"
) -> Drawing:
    """Draw metrics against effective bits, a series for each group, a panel for each metric.

    metric: several with commas. of: whose bits, weights or kv (keys and values); records that have
    16 of these, and nothing to compare, are left out. Raises InputError for any other, and where no
    record is left.
    """
    if of not in _BITS:
        raise InputError(f"of={of} has no bits: choose one of {', '.join(_BITS)}")
    names = metric.split(",")
    found = {path: r for path, r in records_in(records).items() if not _keeps_all(r, of, names)}
    panels = {
        axis_label(name): grouped(found, by, f"bits/{of}/{name.rpartition('/')[2]}", name)
        for name in names
    }
    return draw_panels(panels, _BITS[of])


def _keeps_all(record: Record, of: str, names: Sequence[str]) -> bool:
    """Tell whether a record's networks have 16 bits: their differences are noise."""
    variants = {name.rpartition("/")[2] for name in names}
    return all(record["metrics"].get(f"bits/{of}/{variant}") == 16 for variant in variants)


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


def draw_points(groups: Points, x: str, y: str) -> Drawing:
    """Draw points (x, y), a series for each group, with the names of the axes."""
    return draw_panels({y: groups}, x)


@style()
def draw_panels(panels: Mapping[str, Points], x: str) -> Drawing:
    """Draw points (x, y), a series for each group, in panels by the name of their y.

    A group looks the same in all of them.
    """
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    figure = blank(1.6 * COLUMN if len(panels) == 1 else PAGE, 2.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (y, groups) in zip(axes, panels.items(), strict=True):
        for name, points in groups.items():
            number = names.index(name)
            looks = series(number)
            axis.plot(
                *zip(*points, strict=True), linestyle="", marker=looks.marker, color=looks.colour,
                label=name, fillstyle=fill(number),
            )  # fmt: skip
        heights = (point[1] for points in groups.values() for point in points)
        axis.set(xlabel=x, ylabel=y, yscale=scale_for(heights))
        axis.margins(0.1)
    known = (axis.get_legend_handles_labels() for axis in axes)
    handles = {label: handle for found in known for handle, label in zip(*found, strict=True)}
    figure.legend([handles[name] for name in names], names, loc="outside right upper")
    return Drawing(figure)
