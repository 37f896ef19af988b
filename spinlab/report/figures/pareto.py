"""Accuracy against measured speed and memory of networks, with what no other beats in both."""

from collections.abc import Mapping
from math import nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from spinlab.errors import InputError
from spinlab.report.averaged import read_seeds
from spinlab.report.cells import OF_TEXTS
from spinlab.report.figures.style import PAGE, Drawing, blank, fill, series, style
from spinlab.report.pairs import runs_of
from spinlab.report.records import Record
from spinlab.report.speeds import CASES, read_speeds

_LESS_IS_BETTER = ("ppl/", "kl/", "flips/")
_PERCENT = ("zeroshot_mean/",)  # of answers, which records have as parts
_TO_THE_ORIGINAL = ("kl/", "flips/", "zeroshot_mean/difference")  # whose own is 0


class Point(NamedTuple):
    """A network in a panel: what it takes, what it scores in the mean, spread over seeds."""

    cost: float
    score: float
    spread: float = nan


def pareto(records: str, speeds: str, metric: str = "kl/wiki,kl/c4", methods: str = "") -> Drawing:
    """Draw metrics of methods against the speeds of what they run online, a panel for each pair.

    records: one folder. speeds: records of whole networks, with commas. metric: without a variant,
    several with commas. methods: some of the folder's, with commas; else all that have a speed.
    Raises InputError for a method or a metric without records, for a named method without a speed,
    and where none has one.
    """
    found, timed = read_seeds(Path(records).expanduser()), read_speeds(speeds.split(","))
    runs = {name: runs_of(name, found) for name in (methods.split(",") if methods else found)}
    costs = {name: taken for name, of in runs.items() if (taken := timed.of(of[0]))}
    if not costs or (methods and len(costs) < len(runs)):
        without = ", ".join(name for name in runs if name not in costs)
        raise InputError(f"speeds={speeds} are not of what these methods run online: {without}")
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for name in metric.split(","):
        original = mean(_original(run, name) for of in runs.values() for run in of)
        scores[name] = {"original": (original, nan)}
        scores[name] |= {method: _over_seeds(runs[method], name) for method in costs}
    return draw_pareto({"original": dict.fromkeys(CASES, 1.0), **costs}, scores)


def _over_seeds(runs: list[Record], metric: str) -> tuple[float, float]:
    """Return mean and sample standard deviation, which a single seed does not have."""
    values = [_value(run, f"{metric}/fake") for run in runs]
    return mean(values), stdev(values) if len(values) > 1 else nan


def _original(run: Record, metric: str) -> float:
    return 0.0 if metric.startswith(_TO_THE_ORIGINAL) else _value(run, f"{metric}/fp")


def _value(run: Record, name: str) -> float:
    if (value := run["metrics"].get(name)) is None:
        raise InputError(f"a record of {run['experiment']} has no {name}: give another metric=")
    return 100 * value if name.startswith(_PERCENT) else value


def front(points: Mapping[str, Point], costs_more: bool, less_is_better: bool) -> list[str]:
    """Return the points that no other beats: as cheap and as good, and one of both more so.

    costs_more: whether a higher cost is worse (bytes), or better (speed). The cheapest come first.
    """
    cheap, good = (-1 if costs_more else 1), (-1 if less_is_better else 1)
    placed = {name: (cheap * p.cost, good * p.score) for name, p in points.items()}
    kept: list[str] = []
    for name in sorted(placed, key=lambda name: placed[name], reverse=True):
        last = placed[kept[-1]] if kept else (0.0, -float("inf"))
        if placed[name][1] > last[1] or placed[name] == last:
            kept.append(name)
    return kept


@style()
def draw_pareto(
    costs: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Mapping[str, tuple[float, float]]],
) -> Drawing:
    """Draw mean and spread (by metric and method) against costs (by method and case).

    A grey line joins what no other beats in both.
    """
    cases = [case for case in CASES if all(case in of for of in costs.values())]
    if not cases:
        raise InputError(f"no case was timed for all of {', '.join(costs)}: name others")
    figure = blank(PAGE, 0.8 + 1.7 * len(scores) + 0.05 * len(costs))
    axes = figure.subplots(len(scores), len(cases), sharex="col", sharey="row", squeeze=False)
    for row, (metric, of_methods) in zip(axes, scores.items(), strict=True):
        for axis, case in zip(row, cases, strict=True):
            points = {name: Point(of[case], *of_methods[name]) for name, of in costs.items()}
            best = front(points, not CASES[case].is_time, metric.startswith(_LESS_IS_BETTER))
            axis.plot(*zip(*(points[n][:2] for n in best), strict=True), color="0.6", zorder=0)
            _draw(axis, points)
        row[0].set_ylabel(_title(metric))
    for axis, case in zip(axes[-1], cases, strict=True):
        axis.set_xlabel(f"{case}:\n{'speed' if CASES[case].is_time else 'bytes'} over bfloat16's")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawing(figure)


def _title(metric: str) -> str:
    """Return what the axis of a narrow panel says of a metric: kl/wiki is `wiki KL`."""
    kind, _, text = metric.partition("/")
    if kind in OF_TEXTS:
        return f"{text} {OF_TEXTS[kind][0]}"
    return metric.replace("_mean/", " ") + ", %" * metric.startswith(_PERCENT)


def _draw(axis: Any, points: Mapping[str, Point]) -> None:
    for number, (name, point) in enumerate(points.items()):
        looks = series(number)
        axis.errorbar(
            point.cost, point.score, yerr=point.spread, linestyle="", marker=looks.marker,
            color=looks.colour, fillstyle=fill(number), elinewidth=0.8, label=name,
        )  # fmt: skip
    axis.margins(0.12)
