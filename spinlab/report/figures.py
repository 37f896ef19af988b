"""Figures, drawn from arrays that stages kept."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def draw_outliers(profiles: Mapping[str, np.ndarray], site: str, path: Path) -> None:
    """Draw the largest activation magnitude of every channel, one panel per network.

    profiles: title -> (channels,) magnitudes, in the order of the panels; all share one scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(profiles), 2.6), layout="constrained")
    axes = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for axis, (title, magnitudes) in zip(axes, profiles.items(), strict=True):
        axis.bar(np.arange(len(magnitudes)), magnitudes, width=1.0, color="#4063a3")
        peak = magnitudes.max() / np.sqrt((magnitudes**2).mean())
        axis.set_title(f"{title}\npeak / rms = {peak:.1f}", fontsize=9)
        axis.set_xlabel("channel", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0)
    axes[0].set_ylabel("max |activation|", fontsize=8)
    figure.suptitle(site, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def draw_shares(path: Path) -> Path:
    """Draw where the time of a record's learning step goes, beside it; return the figure's path."""
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    shares = {k.removeprefix("share/learn/"): v for k, v in metrics.items() if k[:6] == "share/"}
    step = metrics["speed/learn/seconds/step"]
    title = f"{path.stem}: {step:.2f} s a step, share of GPU time"
    figure = path.with_suffix(".png")
    _draw_bars(shares, title, figure)
    return figure


def _draw_bars(shares: Mapping[str, float], title: str, path: Path) -> None:
    """Draw shares of a whole, largest first, as one bar each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted(shares, key=lambda name: shares[name])
    figure = Figure(figsize=(5, 0.6 + 0.28 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, [100 * shares[name] for name in names], color="#4063a3")
    for place, name in enumerate(names):
        axis.text(100 * shares[name] + 1, place, f"{100 * shares[name]:.1f} %", va="center", size=8)
    axis.set_xlim(0, 100)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
