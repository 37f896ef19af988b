"""Ranges are learned alone, behind any rotations, where learn.rotations is empty."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from spinlab.compose import composed
from spinlab.config import (
    KVConfig,
    LearnConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.rotation import BlocksConfig
from spinlab.errors import InputError
from spinlab.learn import learn_rotations, resume, save_progress

RATES = RatesConfig(clip=0.02, input_clip=0.02)
LEARN = LearnConfig(
    steps=4,
    batch=2,
    sequence_length=16,
    rotations=[],
    quantize_weights=True,
    optimizer=OptimizerConfig(),
    lr=RATES,
)
QUANT = QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=3))
ROTATIONS = {
    "none": RotationConfig(r1="none", r2="none", r3="none", r4="none"),
    "r1, r2": RotationConfig(),
    "blocks": RotationConfig(
        *("none", "none"), inputs="blocks", r4="none", blocks=BlocksConfig(size=8)
    ),
}


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=ROTATIONS)
def make(request, make_model, learner_of):
    """Return a maker of learners behind one kind of rotation."""
    model, rotation = partial(make_model, torch.float32), ROTATIONS[request.param]

    def made(learn=LEARN, start=rotation):
        return learner_of(model, learn, QUANT, KVConfig(), start)

    return made


def test_ranges_move_and_rotations_stay(make):
    learner, text = make(replace(LEARN, steps=30)), windows(2)
    losses = [learner.step(i, text)["loss"] for i in range(30)]
    assert sum(losses[-3:]) / 3 < losses[0]
    result, start = learner.result(), learner.start
    for name in ("r1", "r2"):
        held, before = getattr(result, name), getattr(start, name)
        assert (held is None) == (before is None)
        assert held is None or torch.allclose(held, before, atol=1e-12)
    assert result.inputs == start.inputs
    for ratios in (result.weight_clips, result.clips):
        assert ratios
    assert any((ratio < 1).any() for ratio in result.weight_clips.values())
    assert any(ratio < 1 for ratio in result.clips.values())


def test_a_step_is_that_beside_rotations_that_are_learned(make_model, learner_of):
    """What a step does to ranges depends on where rotations stand, not on whether they move."""
    make = partial(learner_of, partial(make_model, torch.float32))
    alone = make(LEARN, QUANT)
    beside = make(replace(LEARN, rotations=["r1", "r2"]), QUANT)
    curves = [learner.step(0, windows(2)) for learner in (alone, beside)]
    assert curves[0] == {"loss": curves[1]["loss"]}  # neither a rate nor a norm of rotations
    found, expected = (learner.result() for learner in (alone, beside))
    assert found.clips == expected.clips
    for name, ratios in expected.weight_clips.items():
        torch.testing.assert_close(found.weight_clips[name], ratios, rtol=1e-5, atol=0)


def test_a_resumed_run_ends_with_the_same_bits(make, tmp_path):
    whole, first, second = make(), make(), make()
    curve: list = []
    learn_rotations(whole, windows(8), 0, lambda step, values: curve.append(values))
    part = [first.step(i, windows(8)[2 * i : 2 * i + 2]) for i in range(3)]
    save_progress(first, tmp_path / "progress.safetensors", part)
    resumed = resume(second, tmp_path / "progress.safetensors")
    learn_rotations(second, windows(8), 3, lambda step, values: resumed.append(values))
    assert resumed == curve
    found, expected = second.result(), whole.result()
    assert found.clips == expected.clips
    assert all(torch.equal(found.weight_clips[k], v) for k, v in expected.weight_clips.items())


def test_without_ranges_there_is_nothing_to_learn():
    with pytest.raises(InputError, match=r"learn.rotations is empty: .* learn ranges alone"):
        composed("+experiment=toy", "learn.rotations=[]")
    words = "+experiment=toy", "rotation=wush", "learn=fused", "learn.lr.scale=0"
    assert composed(*words, "learn.rotations=[]").learn.lr.of_ranges
