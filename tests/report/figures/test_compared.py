"""Figures that hold methods against each other show the numbers of the records."""

import json
from pathlib import Path

import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.figures.ablation import ablation

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
SMOLLM2 = EXPERIMENTS / "quality" / "smollm2_135m"


def metric_of(name: str, method: str) -> np.ndarray:
    """Return a metric of the committed records of a method, seed by seed."""
    files = [SMOLLM2 / f"{method}_seed{seed}.json" for seed in range(3)]
    return np.array([json.loads(file.read_text())["metrics"][name] for file in files])


def bars(axis) -> list[list[tuple[float, float]]]:
    """Return where the bars of errors of an axis begin and end, one along the values, by series."""
    return [
        [tuple(segment.tolist()) for segment in container.lines[2][0].get_segments()]
        for container in axis.containers
    ]


def test_choices_are_points_in_their_order_with_standard_errors():
    choices = ["learned_inputs", "blocks_behind_r1", "learned_fused"]
    axes = ablation(str(SMOLLM2), ",".join(["learned_blocks", *choices])).figure.axes
    assert [axis.get_title() for axis in axes] == ["wiki", "c4"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == choices
    assert axes[0].yaxis_inverted()  # the first is on top
    for axis, text in zip(axes, ("wiki", "c4"), strict=True):
        name = f"ppl/{text}/fake"
        base = np.log(metric_of(name, "learned_blocks"))
        moved = np.array([np.log(metric_of(name, choice)) - base for choice in choices])
        errors = moved.std(1, ddof=1) / np.sqrt(3)
        (points,) = (container.lines[0] for container in axis.containers)
        assert points.get_xdata() == pytest.approx(moved.mean(1))
        assert list(points.get_ydata()) == [0, 1, 2]
        ends = [(low[0], high[0]) for low, high in bars(axis)[0]]
        expected = np.stack((moved.mean(1) - errors, moved.mean(1) + errors), 1)
        assert np.array(ends) == pytest.approx(expected)
    with pytest.raises(InputError, match="methods=learned_blocks is a base alone"):
        ablation(str(SMOLLM2), "learned_blocks")


def test_a_single_seed_has_a_point_without_a_bar():
    (axis, _) = ablation(str(SMOLLM2), "quarot,rtn,gptq").figure.axes
    assert [len(ends) for ends in bars(axis)[0]] == [0, 2]
