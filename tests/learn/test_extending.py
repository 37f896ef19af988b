"""An objective and an optimizer of one's own: one function each, and one line in a table."""

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import (
    LearnConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
)
from spinlab.errors import InputError
from spinlab.learn import check_learning, objectives, optim
from spinlab.learn.optim import RotationOptimizer, orthogonal_factor

BATCH = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))


def fourth_power(y):
    """Return the mean fourth power of rotated activations (..., width)."""
    return y.float().pow(4).mean()


class Retraction(RotationOptimizer):
    """Step along the gradient and take the nearest QR factor."""

    def _move(self, p, gradient, group):
        p.copy_(orthogonal_factor(p - group["lr"] * gradient))


@pytest.fixture
def _tables(monkeypatch):
    monkeypatch.setitem(objectives.ACTIVATION_TERMS, "fourth_power", fourth_power)
    new = lambda groups, lr: Retraction(groups, {"lr": lr})  # noqa: E731
    monkeypatch.setitem(optim.OPTIMIZERS, "retraction", new)


@pytest.mark.usefixtures("_tables")
def test_an_objective_and_an_optimizer_are_one_entry_each(make_model, learner_of):
    objective = ObjectiveConfig(cross_entropy=0.0, further={"fourth_power": 1.0})
    learn = LearnConfig(
        steps=8,
        batch=2,
        sequence_length=16,
        objective=objective,
        optimizer=OptimizerConfig("retraction"),
        lr=RatesConfig(0.3),
    )
    outlier = RotationConfig(r1="identity", r2="identity")
    learner = learner_of(lambda: make_model(torch.float32), learn, QuantConfig(), start=outlier)
    curve = [learner.step(i, BATCH) for i in range(8)]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert learner.result().orthogonality()["r1"] < 1e-12
    chosen = ["learn.optimizer.name=retraction", "+learn.objective.further.fourth_power=0.5"]
    config = composed("+experiment=toy", *chosen)
    check_learning(config, None)
    assert config.learn.objective.weights["fourth_power"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learn.optimizer.name=sgd"], "learn.optimizer.name"),
        (["learn.optimizer.schedule=steep"], "learn.optimizer.schedule"),
        (["+learn.objective.further.l7=1"], "learn.objective.further"),
        (["+method=learned_inputs", "learn.quantize_weights=false", "learn.lr.clip=0"], "inputs"),
        (
            ["learn.quantize_weights=false", "learn.lr.input_clip=0.01"],
            "learn.lr.input_clip=0.01 learns ranges beside those of weights",
        ),
        (
            ["learn.quantize_weights=false", "learn.lr.kv_clip=0.01"],
            "learn.lr.kv_clip=0.01 learns ranges beside those of weights",
        ),
    ],
)
def test_names_and_settings_that_no_table_or_space_takes_are_refused(overrides, words):
    config = composed("+experiment=toy", *overrides)
    with pytest.raises(InputError) as refused:
        check_learning(config, None)
    assert words in str(refused.value)
