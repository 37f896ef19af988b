"""One run in full, and two runs side by side."""

import shlex
from typing import Any

from spinlab.config import Config, plain
from spinlab.config.values import text, values_of
from spinlab.report.commands import words_of_command
from spinlab.report.formats import markdown, number
from spinlab.runs.found import Run


def shown(run: Run) -> str:
    """Return what a run was, where its settings are not the defaults, and what came of it."""
    record = run.record
    default = values_of(plain(Config()))
    settings = [
        [name, text(value)]
        for name, value in values_of(record["config"]).items()
        if name not in default or default[name] != value
    ]
    stages = [
        [s["name"], s["key"], "cached" if s["cached"] else "", f"{s['seconds']:.1f}"]
        for s in record["stages"]
    ]
    metrics = [[name, number(value)] for name, value in record["metrics"].items()]
    command = shlex.join(["spinlab", *words_of_command(record)])
    head = f"{run.folder}\n{command}\n{record['status']}"
    parts = [head if run.state != "killed" else f"{head} (its process ended)"]
    for heads, rows in (
        (["setting", "value"], settings),
        (["stage", "key", "", "seconds"], stages),
        (["metric", "value"], metrics),
    ):
        if rows:
            parts.append(markdown([heads, *rows]))
    return "\n\n".join(parts)


def compared(one: Run, other: Run) -> str:
    """Return the settings, inputs and circumstances in which two runs differ, and their metrics."""
    names = [run.record["key"][:8] for run in (one, other)]
    parts = [f"A is {one.folder}\nB is {other.folder}"]
    told = [_told(run) for run in (one, other)]
    rows = [
        [name, *(text(t.get(name, "")) for t in told)]
        for name in dict.fromkeys([*told[0], *told[1]])
        if told[0].get(name) != told[1].get(name)
    ]
    parts.append(markdown([["setting", *names], *rows]) if rows else "The settings are the same.")
    metrics = [run.record["metrics"] for run in (one, other)]
    every = sorted({*metrics[0], *metrics[1]})
    unlike = [name for name in every if metrics[0].get(name) != metrics[1].get(name)]
    if unlike:
        heads = ["metric", *names, "B - A", "%"]
        rows = [_difference(name, metrics[0].get(name), metrics[1].get(name)) for name in unlike]
        parts.append(markdown([heads, *rows]))
    parts.append(f"{len(every) - len(unlike)} of {len(every)} metrics are the same.")
    return "\n\n".join(parts)


def _told(run: Run) -> dict[str, Any]:
    """Return what a run's numbers come from: settings, then inputs, then the machine."""
    record = run.record
    rest = {name: record.get(name, {}) for name in ("identity", "environment")}
    return values_of(record["config"]) | values_of(rest)


def _difference(name: str, a: float | None, b: float | None) -> list[str]:
    if a is None or b is None:
        return [name, number(a), number(b), "", ""]
    share = f"{100 * (b - a) / abs(a):+.2f}" if a else ""
    return [name, number(a), number(b), f"{b - a:+.4g}", share]
