"""Benchmarks as bars: ratios to what they are compared with, and shares of a whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinlab.errors import InputError
from spinlab.report.figures.style import PAGE, Drawing, blank, series, style
from spinlab.report.records import read_benchmark

_KINDS = ("speedup/", "peer/best/", "ratio/")
_BAR = 0.22  # inches


def ratios(record: str) -> Drawing:
    """Draw every ratio of a benchmark's record."""
    found = read_benchmark("record", record)
    return draw_ratios(found["metrics"], title_of(found))


def shares(record: str) -> Drawing:
    """Draw where the time of a record's learning step goes."""
    metrics = read_benchmark("record", record)["metrics"]
    found = {k.removeprefix("share/learn/"): v for k, v in metrics.items() if k[:6] == "share/"}
    if not found:
        raise InputError(f"record={record} has no shares of a learning step")
    step = metrics["speed/learn/seconds/step"]
    return draw_shares(found, f"{Path(record).stem}: {step:.2f} s a step, share of GPU time")


def title_of(record: Mapping[str, Any]) -> str:
    """Say what was timed, and where."""
    return f"{record['experiment']}: {record['environment'].get('gpu') or 'CPU'}"


@style()
def draw_ratios(metrics: Mapping[str, float], title: str) -> Drawing:
    """Draw the ratios among metrics, one group for each kind, with a line at 1.

    Raises InputError where there are none.
    """
    groups = [{n: v for n, v in metrics.items() if n.startswith(kind)} for kind in _KINDS]
    groups = [group for group in groups if group]
    if not groups:
        raise InputError(f"{title} has no ratios: their names start with {', '.join(_KINDS)}")
    counts = [len(group) for group in groups]
    figure = blank(PAGE, _BAR * sum(counts) + 0.6 * len(counts) + 0.4)
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axis, group in zip(axes, groups, strict=True):
        _bars(axis, {name: group[name] for name in sorted(group, reverse=True)}, "{:.2f}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(x=0.1, y=0.01)
    figure.suptitle(title)
    return Drawing(figure)


@style()
def draw_shares(shares: Mapping[str, float], title: str) -> Drawing:
    """Draw shares of a whole, largest first, in percent."""
    names = sorted(shares, key=lambda name: shares[name])
    figure = blank(0.75 * PAGE, 0.6 + _BAR * len(names))
    axis = figure.subplots()
    _bars(axis, {name: 100 * shares[name] for name in names}, "{:.1f} %")
    axis.set_xlim(0, 100)
    axis.set_title(title)
    return Drawing(figure)


def _bars(axis, values: Mapping[str, float], form: str) -> None:
    axis.barh(list(values), list(values.values()), color=series(0).colour, height=0.7)
    for place, value in enumerate(values.values()):
        axis.text(value, place, " " + form.format(value), va="center", size=7)
