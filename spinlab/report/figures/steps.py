"""A small matrix on its way through transforms, as DuQuant's figure 2 shows one."""

from collections.abc import Mapping

import numpy as np

from spinlab.report.figures.style import MAP, PAGE, Drawing, blank, style

# a channel near 10 beside channels near 0.2: rows are tokens
EXAMPLE = ((0.2, 10.0, -0.1, 0.3), (-0.3, 9.8, 0.2, 0.1), (0.1, -10.2, 0.25, -0.2))
_SHARED = "rotation by π/4 of channels 1 and 2"


def duquant() -> Drawing:
    """Draw the example: an outlier shared out between two channels, then between four."""
    return draw_steps(example())


def example() -> dict[str, np.ndarray]:
    """Return the example before and after each of its steps, (tokens, channels), by title."""
    import torch

    from spinlab.rotation.duquant import greedy_rotation

    x = np.array(EXAMPLE)
    givens, cos = np.eye(4), np.sqrt(0.5)
    givens[1:3, 1:3] = [[cos, cos], [-cos, cos]]
    shared = x @ givens
    # six steps with Q' = I, of which the first is the best
    greedy = greedy_rotation(torch.from_numpy(shared)[None], torch.eye(4).repeat(6, 1, 1))[0]
    return {"activations": x, _SHARED: shared, "greedy rotation": shared @ greedy.numpy()}


@style()
def draw_steps(steps: Mapping[str, np.ndarray]) -> Drawing:
    """Draw matrices (tokens, channels) with their numbers, one panel for each step.

    Shades are magnitudes on one scale; titles tell the peak.
    """
    tokens, channels = next(iter(steps.values())).shape
    wide = channels <= 5
    shape = (1, len(steps)) if wide else (len(steps), 1)
    height = 0.7 + 0.25 * tokens if wide else len(steps) * (0.45 + 0.22 * tokens)
    figure = blank(PAGE, height)
    axes = figure.subplots(*shape, squeeze=False).flatten()
    highest = max(np.abs(x).max() for x in steps.values())
    for axis, (title, x) in zip(axes, steps.items(), strict=True):
        axis.imshow(np.abs(x), cmap=MAP, vmin=0, vmax=highest, aspect="auto")
        for (row, column), value in np.ndenumerate(x):
            colour = "black" if abs(value) > 0.5 * highest else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
        axis.set_title(
            f"{title}\nmax |x| = {np.abs(x).max():.2f}"
            if wide
            else f"{title}: max |x| = {np.abs(x).max():.2f}"
        )
        axis.set(xticks=range(channels), yticks=[])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return Drawing(figure)
