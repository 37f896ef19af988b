"""Paired errors against brute force and a bootstrap; pairs by content; the same bytes twice."""

import gzip
import logging

import numpy as np
import pytest

from spinlab.metrics.paired import mean_accuracy, paired
from spinlab.metrics.predictions import Predictions, read_predictions, write_predictions
from spinlab.report.records import zeroshot_mean
from spinlab.report.tables.record import result_table


def answered(rights, metric: str = "acc", first: int = 0) -> list[dict]:
    """Answers to the questions from number `first` on."""
    return [
        {"id": n, "digest": f"q{first + n}", metric: {"answer": int(r), "right": bool(r)}}
        for n, r in enumerate(rights)
    ]


@pytest.fixture
def two() -> tuple[Predictions, Predictions]:
    """Two networks on two tasks, which mostly agree."""
    random = np.random.default_rng(0)
    networks: tuple[Predictions, Predictions] = {}, {}
    for task, count, metric in (("a", 400, "acc"), ("b", 150, "acc_norm")):
        before = random.random(count) < 0.6
        after = np.where(random.random(count) < 0.15, random.random(count) < 0.4, before)
        for network, rights in zip(networks, (before, after), strict=True):
            network[task] = answered(rights, metric)
    return networks


def rights(predictions: Predictions, task: str, metric: str) -> np.ndarray:
    return np.array([answer[metric]["right"] for answer in predictions[task]], dtype=float)


def test_a_small_difference_is_that_worked_out_by_hand():
    before, after = {"a": answered([1, 1, 0, 0])}, {"a": answered([0, 1, 1, 1])}
    found = paired(before, after, {})
    # differences -1, 0, 1, 1: mean 1/4, sample variance 11/12
    assert found["paired/a/acc/difference"] == 0.25
    assert found["paired/a/acc/difference_stderr"] == pytest.approx((11 / 12 / 4) ** 0.5)
    assert (found["paired/a/acc/lost"], found["paired/a/acc/won"]) == (1, 2)
    assert found["paired/a/n"] == 4


def test_errors_of_differences_are_those_of_a_bootstrap(two):
    """Questions are drawn again and again, of every task by itself, both answers with each."""
    found, random = paired(*two, {}), np.random.default_rng(1)
    means = np.zeros(4000)
    for task, metric in (("a", "acc"), ("b", "acc_norm")):
        before, after = (rights(network, task, metric) for network in two)
        drawn = random.integers(len(before), size=(4000, len(before)))
        differences = after[drawn].mean(1) - before[drawn].mean(1)
        error = found[f"paired/{task}/{metric}/difference_stderr"]
        assert error == pytest.approx(differences.std(), rel=0.05)
        apart = np.hypot(*(r.std() / len(r) ** 0.5 for r in (before, after)))
        assert error < 0.7 * apart  # it is what pairing is for
        means += differences / 2
    assert found["zeroshot_mean/difference_stderr"] == pytest.approx(means.std(), rel=0.05)
    assert found["zeroshot_mean/difference"] == pytest.approx(means.mean(), abs=1e-3)


def test_a_mean_over_tasks_weighs_them_alike_and_adds_their_variances(two):
    found = mean_accuracy(two[0], {})
    each = [rights(two[0], task, metric) for task, metric in (("a", "acc"), ("b", "acc_norm"))]
    assert found["zeroshot_mean/accuracy"] == pytest.approx(sum(r.mean() for r in each) / 2)
    variance = sum(r.var(ddof=1) / len(r) for r in each) / 4
    assert found["zeroshot_mean/stderr"] == pytest.approx(variance**0.5)
    assert found["zeroshot_mean/tasks"] == 2


def test_a_task_enters_the_mean_by_likelihood_per_character_where_it_has_that():
    both = [{**a, **b} for a, b in zip(answered([0, 0]), answered([1, 1], "acc_norm"), strict=True)]
    assert mean_accuracy({"a": both}, {})["zeroshot_mean/accuracy"] == 1
    found = paired({"a": both}, {"a": [{**both[0], "acc_norm": both[1]["acc"]}, both[1]]}, {})
    assert found["zeroshot_mean/difference"] == found["paired/a/acc_norm/difference"] == -0.5
    assert found["paired/a/acc/difference"] == 0


def test_the_accuracy_that_is_chosen_of_a_task_enters_means_tables_and_differences_alike():
    both = [
        {**a, **b}
        for a, b in zip(answered([0, 1, 1, 1]), answered([1] * 4, "acc_norm"), strict=True)
    ]
    other = {"a": [{**answer, "acc": answer["acc_norm"]} for answer in both], "b": answered([1, 0])}
    original, chosen = {"a": both, "b": answered([1, 0])}, {"a": "acc"}
    found = mean_accuracy(original, chosen)
    assert found["zeroshot_mean/accuracy"] == (0.75 + 0.5) / 2
    assert paired(original, other, chosen)["zeroshot_mean/difference"] == 0.25 / 2
    assert paired(original, other, {})["zeroshot_mean/difference"] == 0
    metrics = {"zeroshot/a/acc/fp": 0.75, "zeroshot/a/acc_norm/fp": 1.0, "zeroshot/b/acc/fp": 0.5}
    published = zeroshot_mean(metrics, ["a", "b"], chosen, "fp")
    assert published == 100 * found["zeroshot_mean/accuracy"]
    metrics |= {f"{name}/fp": value for name, value in found.items()}
    table = result_table({"metrics": metrics, "config": {"eval": {"task_metrics": chosen}}})
    cells = table.splitlines()[2].split("|")[3:6]
    assert [cell.split()[0] for cell in cells] == ["75.0", "50.0", "62.5"]


def test_networks_that_answer_alike_do_not_differ(two):
    found = paired(two[0], two[0], {})
    differing = {name: value for name, value in found.items() if value and not name.endswith("/n")}
    assert differing == {}


def test_only_the_same_questions_are_paired_and_it_is_told(caplog):
    before, after = answered([1, 0, 1]), answered([1, 1, 1, 1], first=1)
    with caplog.at_level(logging.WARNING):
        found = paired({"a": before, "b": before}, {"a": after, "c": after}, {})
    assert found["paired/a/n"] == 2
    assert found["paired/a/acc/difference"] == 0.5  # q1 and q2: 0 1 and 1 1
    assert not [name for name in found if name.startswith(("paired/b", "paired/c"))]
    assert "2 questions of a are compared: one has 3, the other 4" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert paired({"a": answered([1, 0])}, {"a": answered([1, 0], first=1)}, {}) == {}


def test_a_question_that_is_asked_twice_has_two_answers():
    twice = [{**answer, "digest": "q"} for answer in answered([1, 0, 1])]
    other = [{**answer, "digest": "q"} for answer in answered([1, 1, 1])]
    found = paired({"a": twice}, {"a": other}, {})
    assert (found["paired/a/n"], found["paired/a/acc/won"]) == (3, 1)


def test_predictions_are_read_as_they_were_written_and_have_the_same_bytes(two, tmp_path):
    first, second = tmp_path / "a.json.gz", tmp_path / "b.json.gz"
    write_predictions(first, two[0])
    write_predictions(second, read_predictions(first))
    assert read_predictions(second) == two[0]
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # no time
    assert b"a.json" not in first.read_bytes()
    assert gzip.decompress(first.read_bytes()).startswith(b'{"a":[')
