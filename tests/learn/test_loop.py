"""The loop of learning: losses, gradients, resumed runs, and what it leaves alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    KVConfig,
    LearnConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.learn import learn_rotations, resume, save_progress
from spinlab.learn.optim import OPTIMIZERS, rate_at
from spinlab.model.modules import embedding_of, linears_of
from spinlab.rotation.orthogonal import orthogonality_error
from spinlab.weights.rtn import search_ratios, starting_ratios

OFF = TensorQuant(bits=16)
FLOAT = QuantConfig(weights=OFF, activations=OFF)
FINE = QuantConfig(weights=TensorQuant(bits=15, symmetric=True), activations=OFF)
FLOAT_KV = KVConfig(CodecConfig(bits=16), CodecConfig(bits=16))


@pytest.fixture
def make_learner(learner_of):
    """Return a maker of learners in float32; without formats nothing is rounded."""

    def made(make_model, learn, quant=FLOAT, kv=FLOAT_KV, start=None):
        return learner_of(partial(make_model, torch.float32), learn, quant, kv, start)

    return made


def windows(count: int, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(2))


STEPS = OptimizerConfig(project_every=3)
SETTINGS = dict(steps=4, batch=2, sequence_length=16, clip_refresh=2)


def biased(make_model):
    """A maker whose models have random biases everywhere, as Qwen2 has on q, k and v."""

    def make(dtype=torch.float32):
        model = make_model(dtype, attention_bias=True, mlp_bias=True)
        g = torch.Generator().manual_seed(5)
        for _, linear in linears_of(model):
            linear.bias.data.normal_(generator=g)
        return model

    return make


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def make_any(request, make_model):
    return biased(make_model) if request.param else make_model


# weights stay as they are, or are rotated and rounded, so finely that nothing is lost
SPACES = {"activations": (FLOAT, False), "weights": (FINE, True)}


@pytest.mark.parametrize("space", SPACES)
def test_without_quantizers_the_loss_is_the_original_models(make_any, make_learner, space):
    """Rotations cancel: also the ends, where R1 turns the embedding's output and head's input."""
    quant, rounded = SPACES[space]
    learn = LearnConfig(**SETTINGS, optimizer=STEPS, quantize_weights=rounded)
    learner = make_learner(make_any, learn, quant)
    batch = windows(2)
    model = make_any(torch.float32)
    expected = model(input_ids=batch, labels=batch).loss
    assert learner.gradients(0, batch)[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_without_quantizers_no_rotation_has_a_gradient_along_the_manifold(
    make_any, make_learner, name
):
    """The loss does not depend on R, so its Riemannian gradient is zero: this needs every site's
    gradient and both ends', for any one that were missing would leave its part. The norm is that of
    the whole gradient, which is not zero."""
    quant, rounded = SPACES["weights"]
    settings = {**SETTINGS, "rotations": [name], "quantize_weights": rounded}
    optimizer = replace(STEPS, grad_norm="euclidean", max_grad_norm=None)
    learn = LearnConfig(**settings, optimizer=optimizer)
    learner = make_learner(make_any, learn, quant)
    _, whole = learner.gradients(0, windows(2))
    assert whole > 1e-4
    assert learner.rotations.parameters[name].grad.norm() < 1e-2 * whole


@pytest.mark.parametrize("rounded", [False, True])
def test_micro_batches_add_up_to_the_batch(make_model, make_learner, rounded):
    found = []
    for micro in (1, 4):
        learn = LearnConfig(
            **{**SETTINGS, "batch": 4, "micro_batch": micro},
            quantize_weights=rounded,
            optimizer=replace(STEPS, max_grad_norm=None),
        )
        quant = QuantConfig(weights=TensorQuant(symmetric=True))
        learner = make_learner(make_model, learn, quant, KVConfig())
        learner.gradients(0, windows(4))
        found.append(learner.rotations.r1.grad.clone())
    assert torch.allclose(*found, atol=1e-4 * found[0].abs().max())


def test_learning_wins_back_half_of_what_quantization_lost(make_model, make_learner):
    """A planted outlier channel, no rotation to start from, text that the model wrote itself.

    Inputs have 3 bits, so that more is lost than the text's own noise.
    """

    def loud(dtype=torch.float32):
        model = make_model(dtype)
        embedding_of(model).weight.data[:, 5] *= 10
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data[5] /= 10
        return model

    torch.manual_seed(0)
    prompts = torch.randint(0, 64, (8, 1))
    text = loud().generate(prompts, max_new_tokens=23, do_sample=True, pad_token_id=0)
    floor = loud()(input_ids=text, labels=text).loss.item()
    learn = LearnConfig(
        steps=60,
        batch=8,
        micro_batch=8,
        sequence_length=24,
        lr=RatesConfig(0.03),
        quantize_weights=True,
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=3))
    rotation = RotationConfig(r1="identity", r2="identity")
    learner = make_learner(loud, learn, quant, KVConfig(), rotation)
    curve: list = []
    learn_rotations(learner, text.repeat(60, 1), 0, lambda step, values: curve.append(values))
    losses = [values["loss"] for values in curve]
    assert losses[0] - floor > 0.05
    assert sum(losses[-5:]) / 5 - floor < 0.5 * (losses[0] - floor)
    result = learner.result()
    assert orthogonality_error(result.r1) < 1e-12
    assert orthogonality_error(result.r2) < 1e-12
    assert {"loss", "lr", "grad_norm", "alpha/r1", "capped/r2", "orthogonality/r1"} <= set(curve[0])


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(make_model, make_learner, tmp_path, name, clip):
    learn = LearnConfig(
        **SETTINGS,
        rotations=["r1", "r2", "r3"],
        quantize_weights=True,
        optimizer=replace(STEPS, name=name, momentum=0.0 if name.endswith("adam") else 0.5),
        lr=RatesConfig(0.01, clip=clip),
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    whole = make_learner(make_model, learn, quant, KVConfig())
    curve: list = []
    learn_rotations(whole, windows(8), 0, lambda step, values: curve.append(values))

    first = make_learner(make_model, learn, quant, KVConfig())
    part = [first.step(i, windows(8)[2 * i : 2 * i + 2]) for i in range(3)]
    save_progress(first, tmp_path / "progress.safetensors", part)
    second = make_learner(make_model, learn, quant, KVConfig())
    resumed = resume(second, tmp_path / "progress.safetensors")
    learn_rotations(second, windows(8), 3, lambda step, values: resumed.append(values))
    assert resumed == curve
    assert torch.equal(second.result().r1, whole.result().r1)
    assert torch.equal(second.result().r2, whole.result().r2)
    assert torch.equal(second.result().r3.dense(), whole.result().r3.dense())
    found, expected = second.result().weight_clips, whole.result().weight_clips
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert bool(expected) == bool(clip)


def test_learning_goes_on_from_the_ranges_that_came_with_the_rotations(make_model, make_learner):
    learn = LearnConfig(
        **SETTINGS, quantize_weights=True, optimizer=STEPS, lr=RatesConfig(clip=1e-9)
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    first = make_learner(make_model, learn, quant, KVConfig())
    first.step(0, windows(2))
    narrow = {name: ratio / 2 for name, ratio in first.result().weight_clips.items()}
    start = replace(first.result(), weight_clips=narrow)
    second = make_learner(make_model, learn, quant, KVConfig(), start)
    second.step(0, windows(2))
    for name, ratio in second.result().weight_clips.items():
        assert torch.allclose(ratio, narrow[name], rtol=1e-5)
    third = make_learner(make_model, replace(learn, lr=RatesConfig()), quant, KVConfig(), start)
    third.step(0, windows(2))
    assert third.result().weight_clips == {}


def test_ranges_start_in_the_middle_of_a_step_of_their_scales(make_model, make_learner):
    """Searched ratios lie at its edge, and the first small step would move scales by an eighth."""
    learn = LearnConfig(
        **SETTINGS, quantize_weights=True, optimizer=STEPS, lr=RatesConfig(clip=0.004)
    )
    weights = TensorQuant(symmetric=True, group_size=16, format="nvfp4")
    wide = partial(make_model, hidden_size=32, intermediate_size=48, head_dim=8)
    learner = make_learner(wide, learn, QuantConfig(weights=weights, activations=OFF))
    learner.gradients(0, windows(2))
    (batch, *_), ranges = learner.space.batches, learner.space.ranges
    with torch.no_grad():
        rotated = batch.weights(learner.rotations.r1, learner.rotations.r2)
    expected = starting_ratios(rotated.flatten(0, 1), weights, ClipSearch())
    found = [ranges.value(linear.site.path) for linear in batch.linears]
    torch.testing.assert_close(torch.cat(found), expected)
    searched = search_ratios(rotated.flatten(0, 1), weights, ClipSearch())
    assert ((expected - searched).abs() > 0.01).any()


def test_the_last_good_numbers_hold_the_weight_ranges_too(make_model, make_learner):
    learn = LearnConfig(
        **SETTINGS, quantize_weights=True, optimizer=STEPS, lr=RatesConfig(clip=0.1)
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner = make_learner(make_model, learn, quant, KVConfig())
    learner.step(0, windows(2))
    before = learner.result().weight_clips
    learner.step(1, windows(2))
    moved = learner.result().weight_clips
    learner.restore(learner.divergence.last_good)
    for name, ratio in learner.result().weight_clips.items():
        assert torch.equal(ratio, before[name])
        assert not torch.equal(ratio, moved[name])


def test_only_the_chosen_rotations_move(make_model, make_learner):
    learn = LearnConfig(**SETTINGS, optimizer=STEPS, rotations=["r2"], lr=RatesConfig(0.5))
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner = make_learner(make_model, learn, quant, KVConfig())
    learn_rotations(learner, windows(8), 0, lambda step, values: None)
    result = learner.result()
    assert torch.allclose(result.r1, learner.start.r1, atol=1e-6)
    assert not torch.allclose(result.r2, learner.start.r2, atol=1e-3)


def test_divergence_stops_the_run(make_model, make_learner):
    learner = make_learner(make_model, LearnConfig(**SETTINGS, optimizer=STEPS))
    learner.head.data.fill_(float("nan"))
    with pytest.raises(InputError, match="step 0"):
        learner.step(0, windows(2))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules_fall_to_zero_after_the_last_step(schedule, expected):
    learn = LearnConfig(steps=4, optimizer=OptimizerConfig(schedule=schedule))
    assert [rate_at(learn, i) for i in range(4)] == pytest.approx(expected, abs=1e-4)


def test_warmup_rises_before_the_schedule_starts():
    learn = LearnConfig(steps=6, optimizer=OptimizerConfig(schedule="linear", warmup=2))
    assert [rate_at(learn, i) for i in range(4)] == pytest.approx([0.5, 1, 1, 0.75])
