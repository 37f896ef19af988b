"""Figures that hold methods against each other show the numbers of the records."""

import json
from pathlib import Path

import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.figures.ablation import ablation
from spinlab.report.figures.pareto import Point, front, pareto

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


@pytest.mark.parametrize("costs_more", [True, False])
@pytest.mark.parametrize("less_is_better", [True, False])
def test_the_front_is_what_no_other_beats(costs_more, less_is_better):
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = rng.integers(0, 6, (12, 2))  # with many ties
        points = {str(n): Point(*map(float, row)) for n, row in enumerate(drawn)}
        sign = np.array([1 if costs_more else -1, 1 if less_is_better else -1])
        worth = drawn * sign  # less is better in both
        beaten = [((worth <= w).all(1) & (worth < w).any(1)).any() for w in worth]
        found = front(points, costs_more, less_is_better)
        assert sorted(found, key=int) == [str(n) for n, by in enumerate(beaten) if not by]
        costs = [worth[int(name)][0] for name in found]
        assert costs == sorted(costs)


def test_methods_are_where_their_speed_and_their_score_put_them(time_network):
    speeds = {None: (2.96, 3.13, 1.93), "learned_blocks": (2.8, 2.75, 1.75)}
    files = []
    for method, (one, many, prefill) in speeds.items():
        files.append(time_network("decode", method, {"b1": one, "b16": many}))
        files.append(time_network("prefill", method, {"b1": prefill}))
    named, places = ",".join(map(str, files)), {"quarot": None, "learned_blocks": "learned_blocks"}
    metrics = ["kl/c4", "ppl/wiki"]
    drawing = pareto(str(SMOLLM2), named, ",".join(metrics), ",".join(places))
    axes = np.array(drawing.figure.axes).reshape(len(metrics), 4)
    original = {"kl/c4": 0.0, "ppl/wiki": metric_of("ppl/wiki/fp", "quarot").mean()}
    for row, metric in zip(axes, metrics, strict=True):
        for case, axis in enumerate(row):
            found = {c.get_label(): c.lines[0].get_data() for c in axis.containers}
            assert [*found] == ["original", *places]
            assert np.ravel(found["original"]) == pytest.approx([1, original[metric]])
            for bar, (method, timed) in zip(bars(axis)[1:], places.items(), strict=True):
                one, many, prefill = speeds[timed]
                scores = metric_of(f"{metric}/fake", method)
                cost = (one, many, prefill, 1 / many)[case]
                assert np.ravel(found[method]) == pytest.approx([cost, scores.mean()])
                ends = scores.mean() + scores.std(ddof=1) * np.array([-1, 1])
                assert [end[1] for end in bar[0]] == pytest.approx(ends)
            (line,) = (line for line in axis.lines if line.get_linestyle() == "-")
            assert line.get_xdata() == pytest.approx(
                [found[n][0][0] for n in (*places, "original")]
            )
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["c4 KL", "wiki ppl"]


def test_without_a_speed_or_a_metric_there_is_no_figure(time_network):
    speed = str(time_network("decode", "learned_inputs", {"b1": 2.0}))
    with pytest.raises(InputError, match="are not of what these methods run online: rtn, quarot"):
        pareto(str(SMOLLM2), speed, methods="rtn,learned_inputs,quarot")
    with pytest.raises(InputError, match=r"has no kl/wikitext2/fake: give another metric="):
        pareto(str(SMOLLM2), speed, "kl/wikitext2")
