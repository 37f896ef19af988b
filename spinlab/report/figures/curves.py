"""Learning curves: the loss with its terms, and how orthogonal the rotations stay."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.errors import InputError
from spinlab.report.figures.style import PAGE, Drawing, blank, series, style
from spinlab.report.records import read_curve

Curve = Sequence[Mapping[str, float]]

_DRIFT = "orthogonality/"
_NO_TERMS = ("lr", "grad_norm", "step")


def curves(run: str) -> Drawing:
    """Draw the curves of runs. run: their folders, with commas."""
    return draw_curves({Path(place).name: curve_of(Path(place)) for place in run.split(",")})


def curve_of(folder: Path) -> Curve:
    """Return what a run said of every step of its learning. Raises InputError if it said nothing.

    A line that a kill cut off is left out.
    """
    path = folder.expanduser() / "metrics.jsonl"
    if not path.is_file():
        raise InputError(
            f"run={folder} has no metrics.jsonl: is it the folder of a run that learned?"
        )
    found, _ = read_curve(path)
    if not found:
        raise InputError(f"run={folder}: its metrics.jsonl has no steps")
    return found


@style()
def draw_curves(curves: Mapping[str, Curve]) -> Drawing:
    """Draw loss and orthogonality over steps. curves: name of a run -> the values of each step.

    One run is drawn with the terms of its loss and every rotation; of several the loss and the
    worst rotation are compared.
    """
    figure = blank(PAGE, 2.3)
    loss, drift = figure.subplots(1, 2)
    single = len(curves) == 1
    for number, (name, curve) in enumerate(curves.items()):
        terms = [k for k in curve[0] if "/" not in k and k not in _NO_TERMS] if single else ["loss"]
        rotations = [k for k in curve[0] if k.startswith(_DRIFT)]
        for place, term in enumerate(terms):
            label = term if single else name
            _line(loss, curve, [term], label, number + place)
        for place, rotation in enumerate(rotations if single else [rotations] * bool(rotations)):
            label = rotation.removeprefix(_DRIFT) if isinstance(rotation, str) else name
            keys = [rotation] if isinstance(rotation, str) else rotation
            _line(drift, curve, keys, label, number + place)
    loss.set(xlabel="step", ylabel="loss")
    drift.set(xlabel="step", ylabel="max |R Rᵀ - I|", yscale="log")
    for axis in (loss, drift):
        if axis.lines:
            axis.legend()
    return Drawing(figure)


def _line(axis, curve: Curve, keys: Sequence[str], label: str, number: int) -> None:
    """Draw the largest of some values of each step."""
    looks, steps = series(number), range(len(curve))
    values = [max(point[key] for key in keys) for point in curve]
    every = max(1, len(curve) // 8)
    axis.plot(
        steps, values, label=label, color=looks.colour, linestyle=looks.line, marker=looks.marker,
        markevery=every,
    )  # fmt: skip
