"""Activations before and after rotating: peaks of channels, and surfaces."""

from collections.abc import Mapping

import numpy as np

from spinlab.report.figures.runs import RunFolder
from spinlab.report.figures.style import MAP, PAGE, Drawing, blank, series, style

TITLES = {
    "before": "before rotation",
    "init": "initial rotation",
    "learned": "learned rotation",
}
_CELLS = (64, 96)  # of a surface, at most: more are smaller than what a print shows


def outliers(run: str, cache: str = "") -> Drawing:
    """Draw the peaks of the layer with the worst outliers. run: its folder; cache: its stages'."""
    folder = RunFolder(run, cache)
    peaks, layer = folder.tensors("outliers", "peaks"), _layer(folder)
    return draw_outliers(
        {t: peaks[n][layer] for n, t in TITLES.items() if n in peaks}, _site(folder)
    )


def surface(run: str, cache: str = "") -> Drawing:
    """Draw the inputs of the layer with the worst outliers, tokens by channels."""
    folder = RunFolder(run, cache)
    inputs = folder.tensors("outliers", "inputs")
    return draw_surfaces({t: inputs[n] for n, t in TITLES.items() if n in inputs}, _site(folder))


def _layer(folder: RunFolder) -> int:
    return int(folder.tensors("outliers", "inputs")["layer"])


def _site(folder: RunFolder) -> str:
    return f"{folder.model}, attention input of layer {_layer(folder)}"


@style()
def draw_outliers(profiles: Mapping[str, np.ndarray], site: str) -> Drawing:
    """Draw the largest activation magnitude of every channel, one panel per network.

    profiles: title -> (channels,) magnitudes, in the order of the panels; all share one scale.
    """
    figure = blank(PAGE, 2.2)
    axes = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for axis, (title, magnitudes) in zip(axes, profiles.items(), strict=True):
        # lines keep their width where a bar would be narrower than a pixel, and be lost
        axis.vlines(np.arange(len(magnitudes)), 0, magnitudes, colors=series(0).colour, lw=0.6)
        peak = magnitudes.max() / np.sqrt((magnitudes**2).mean())
        axis.set_title(f"{title}\npeak / rms = {peak:.1f}")
        axis.set_xlabel("channel")
        axis.margins(x=0.01)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("max |activation|")
    figure.suptitle(site)
    return Drawing(figure)


@style()
def draw_surfaces(activations: Mapping[str, np.ndarray], site: str) -> Drawing:
    """Draw magnitudes over tokens and channels as surfaces, one for each network, on one scale.

    activations: title -> (tokens, channels). Of cells that are too small to be seen the largest
    stands for its neighbours, so that no peak is lost.
    """
    figure = blank(PAGE, 2.6)
    highest = max(np.abs(x).max() for x in activations.values())
    for number, (title, x) in enumerate(activations.items(), start=1):
        axis = figure.add_subplot(1, len(activations), number, projection="3d")
        tokens, channels, heights = _pooled(np.abs(x))
        axis.plot_surface(
            channels[None, :], tokens[:, None], heights, cmap=MAP, vmin=0, vmax=highest,
            rcount=len(tokens), ccount=len(channels), linewidth=0, antialiased=False,
            rasterized=True,
        )  # fmt: skip
        axis.set(xlabel="channel", ylabel="token", zlim=(0, highest))
        axis.set_title(f"{title}\nmax |x| = {np.abs(x).max():.1f}")
        axis.tick_params(labelsize=6, pad=-2)
        axis.view_init(elev=28, azim=-58)
        axis.set_box_aspect((1.2, 1, 0.8), zoom=0.85)  # type: ignore[arg-type]  # room for labels
    figure.suptitle(site)
    return Drawing(figure)


def _pooled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, channels and heights of a surface: the largest of every cell, at its start."""
    rows, columns = (
        np.unique(np.linspace(0, size, min(size, most), endpoint=False).astype(int))
        for size, most in zip(x.shape, _CELLS, strict=True)
    )
    heights = np.maximum.reduceat(np.maximum.reduceat(x, rows, axis=0), columns, axis=1)
    return rows, columns, heights
