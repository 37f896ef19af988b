"""Temporary hooks: a pass that fails leaves none on a model, whoever put them there."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig
from spinlab.learn.spaces import LearningSpace
from spinlab.learn.teacher import layer_errors, layer_states
from spinlab.model.hooks import temporary_hooks
from spinlab.model.modules import head_of, linears_of
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.check import first_broken
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import gather_statistics
from spinlab.stages.outliers import attention_inputs
from spinlab.weights.calibration import LayerInputs

IDS = torch.zeros(1, 4, dtype=torch.long)
RUNS: dict[str, Callable[[PreTrainedModel], object]] = {
    "states of layers": lambda model: layer_states(model, IDS),
    "errors of layers": lambda model: layer_errors(
        model, LearningSpace.__new__(LearningSpace), IDS, [torch.zeros(1, 4, 24)] * 3
    ),
    "statistics": lambda model: gather_statistics(model, IDS),
    "the gate": lambda model: first_broken(lambda: model, lambda: model, RotationSet(), IDS, 1e-9),
    "outliers": lambda model: attention_inputs(model, IDS),
    "layer inputs": lambda model: LayerInputs(model, IDS, 1),
}


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Failure(Exception):
    """Stand for whatever may go wrong in a pass."""


@pytest.mark.parametrize("run", RUNS)
def test_a_failing_pass_leaves_no_hook(make_model, monkeypatch, run):
    model = RotatedNetworks(lambda: make_model(torch.float32), QuantConfig(), KVConfig()).learnable(
        RotationSet()
    )
    before = hooks_of(model)

    def fail(*arguments, **settings):
        raise Failure

    place = model.model.layers[0].mlp if run != "layer inputs" else model.model.rotary_emb
    monkeypatch.setattr(place, "forward", fail)
    with pytest.raises(Failure):
        RUNS[run](model)
    assert hooks_of(model) == before


def test_a_failing_look_at_a_linear_leaves_no_hook(make_model):
    model = make_model(torch.float32)
    inputs = LayerInputs(model, IDS, 1)

    def fail(x):
        raise Failure

    *_, linear = next(linears_of(model))
    with pytest.raises(Failure):
        inputs.visit(linear, fail)
    assert hooks_of(model) == 0


def test_hooks_see_passes_until_the_end_of_the_block(make_model):
    model, seen = make_model(torch.float32), []
    head = head_of(model)
    with temporary_hooks() as hooks:
        hooks.append(head.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape)))
        model(IDS)
    model(IDS)
    assert seen == [(1, 4, 24)]
