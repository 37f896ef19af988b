from dataclasses import replace

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    KVConfig,
    LearnConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.learn import OPTIMIZERS
from spinlab.errors import InputError
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.learn.optim.schedule import rate_at
from spinlab.learn.progress import resume, save_progress
from spinlab.model.seams import dimensions_of, linear_at, linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.orthogonal import orthogonality_error

OFF = TensorQuant(bits=16)
FLOAT = QuantConfig(weights=OFF, activations=OFF)
FINE = QuantConfig(weights=TensorQuant(bits=15, symmetric=True), activations=OFF)
FLOAT_KV = KVConfig(k_bits=16, v_bits=16)


def make_learner(make_model, learn, quant=FLOAT, kv=FLOAT_KV, rotation=None):
    networks = QuantizedNetworks(lambda: make_model(torch.float32), quant, kv)
    dimensions = dimensions_of(make_model().config)
    rotation = rotation or RotationConfig()
    start = initial_rotations(rotation, dimensions, torch.Generator().manual_seed(0))
    model = networks.learnable(start)
    return RotationLearner(model, start, learn, quant, ClipSearch()), networks


def windows(count: int, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(2))


SETTINGS = dict(steps=4, batch=2, sequence_length=16, clip_refresh=2, project_every=3)


def biased(make_model):
    """A maker whose models have random biases everywhere, as Qwen2 has on q, k and v."""

    def make(dtype=torch.float32):
        model = make_model(dtype, attention_bias=True, mlp_bias=True)
        g = torch.Generator().manual_seed(5)
        for _, _, _, linear in linears_of(model):
            linear.bias.data.normal_(generator=g)
        return model

    return make


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def make_any(request, make_model):
    return biased(make_model) if request.param else make_model


def gradients(learner, batch):
    """Do all of a step but the moves: return the loss's terms and the norm of the gradient."""
    learner.rotations.begin()
    learner.form.begin(0)
    terms = learner._backward(batch)
    learner.form.collect()
    return terms, learner.rotations.finish(None).item()


# weights stay as they are, or are rotated and rounded, so finely that nothing is lost
FORMS = {"activations": (FLOAT, False), "weights": (FINE, True)}


@pytest.mark.parametrize("form", FORMS)
def test_without_quantizers_the_loss_is_the_original_models(make_any, form):
    """Rotations cancel: also the ends, where R1 turns the embedding's output and head's input."""
    quant, rounded = FORMS[form]
    learn = LearnConfig(**SETTINGS, quantize_weights=rounded)
    learner, _ = make_learner(make_any, learn, quant)
    batch = windows(2)
    model = make_any(torch.float32)
    expected = model(input_ids=batch, labels=batch).loss
    assert gradients(learner, batch)[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_without_quantizers_no_rotation_has_a_gradient_along_the_manifold(make_any):
    """The loss does not depend on R, so its Riemannian gradient is zero: this needs every seam's
    gradient and both ends', for any one that were missing would leave its part."""
    quant, rounded = FORMS["weights"]
    learner, _ = make_learner(make_any, LearnConfig(**SETTINGS, quantize_weights=rounded), quant)
    gradients(learner, windows(2))
    for name, p in learner.rotations.parameters.items():
        parts = learner.rotations._generators, learner.rotations._gradients
        whole = parts[0][name] + parts[1][name] @ p.detach().mT
        assert p.grad.abs().max() < 1e-2 * whole.abs().max()
        assert whole.abs().max() > 1e-4


@pytest.mark.parametrize("rounded", [False, True])
def test_micro_batches_add_up_to_the_batch(make_model, rounded):
    found = []
    for micro in (1, 4):
        learn = LearnConfig(
            **{**SETTINGS, "batch": 4, "micro_batch": micro}, quantize_weights=rounded
        )
        quant = QuantConfig(weights=TensorQuant(symmetric=True))
        learner, _ = make_learner(make_model, learn, quant, KVConfig())
        gradients(learner, windows(4))
        found.append(learner.rotations.r1.grad.clone())
    assert torch.allclose(*found, atol=1e-4 * found[0].abs().max())


def test_learning_wins_back_half_of_what_quantization_lost(make_model):
    """A planted outlier channel, no rotation to start from, text that the model wrote itself.

    Inputs have 3 bits, so that more is lost than the text's own noise.
    """

    def loud(dtype=torch.float32):
        model = make_model(dtype)
        linear_at(model, "model.embed_tokens").weight.data[:, 5] *= 10
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data[5] /= 10
        return model

    torch.manual_seed(0)
    prompts = torch.randint(0, 64, (8, 1))
    text = loud().generate(prompts, max_new_tokens=23, do_sample=True, pad_token_id=0)
    floor = loud()(input_ids=text, labels=text).loss.item()
    learn = LearnConfig(
        steps=60, batch=8, micro_batch=8, sequence_length=24, lr=0.03, quantize_weights=True
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=3))
    rotation = RotationConfig(r1="identity", r2="identity")
    learner, _ = make_learner(loud, learn, quant, KVConfig(), rotation=rotation)
    curve: list = []
    learn_rotations(learner, text.repeat(60, 1), 0, lambda step, values: curve.append(values))
    losses = [values["loss"] for values in curve]
    assert losses[0] - floor > 0.05
    assert sum(losses[-5:]) / 5 - floor < 0.5 * (losses[0] - floor)
    result = learner.result()
    assert orthogonality_error(result.r1) < 1e-12
    assert orthogonality_error(result.r2) < 1e-12
    assert {"loss", "lr", "grad_norm", "alpha/r1", "capped/r2", "orthogonality/r1"} <= set(curve[0])


@pytest.mark.parametrize("lr_clip", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_bits(make_model, tmp_path, optimizer, lr_clip):
    learn = LearnConfig(
        **SETTINGS,
        quantize_weights=True,
        optimizer=optimizer,
        momentum=0.0 if optimizer.endswith("adam") else 0.5,
        lr=0.01,
        lr_clip=lr_clip,
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    whole, _ = make_learner(make_model, learn, quant, KVConfig())
    curve: list = []
    learn_rotations(whole, windows(8), 0, lambda step, values: curve.append(values))

    first, _ = make_learner(make_model, learn, quant, KVConfig())
    part = [first.step(i, windows(8)[2 * i : 2 * i + 2]) for i in range(3)]
    save_progress(first, tmp_path / "progress.safetensors", part)
    second, _ = make_learner(make_model, learn, quant, KVConfig())
    resumed = resume(second, tmp_path / "progress.safetensors")
    learn_rotations(second, windows(8), 3, lambda step, values: resumed.append(values))
    assert resumed == curve
    assert torch.equal(second.result().r1, whole.result().r1)
    assert torch.equal(second.result().r2, whole.result().r2)
    found, expected = second.result().weight_clips, whole.result().weight_clips
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert bool(expected) == bool(lr_clip)


def test_learning_goes_on_from_the_ranges_that_came_with_the_rotations(make_model):
    learn = LearnConfig(**SETTINGS, quantize_weights=True, lr_clip=1e-9)
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    first, networks = make_learner(make_model, learn, quant, KVConfig())
    first.step(0, windows(2))
    narrow = {name: ratio / 2 for name, ratio in first.result().weight_clips.items()}
    start = replace(first.result(), weight_clips=narrow)
    settings = learn, quant, ClipSearch()
    second = RotationLearner(networks.learnable(start), start, *settings)
    second.step(0, windows(2))
    for name, ratio in second.result().weight_clips.items():
        assert torch.allclose(ratio, narrow[name], rtol=1e-5)
    searched = replace(learn, lr_clip=0.0), quant, ClipSearch()
    third = RotationLearner(networks.learnable(start), start, *searched)
    third.step(0, windows(2))
    assert third.result().weight_clips == {}


def test_the_last_good_numbers_hold_the_weight_ranges_too(make_model):
    learn = LearnConfig(**SETTINGS, quantize_weights=True, lr_clip=0.1)
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner, _ = make_learner(make_model, learn, quant, KVConfig())
    learner.step(0, windows(2))
    before = learner.result().weight_clips
    learner.step(1, windows(2))
    moved = learner.result().weight_clips
    learner.restore(learner.guard.last_good)
    for name, ratio in learner.result().weight_clips.items():
        assert torch.equal(ratio, before[name])
        assert not torch.equal(ratio, moved[name])


def test_only_the_chosen_rotations_move(make_model):
    learn = LearnConfig(**SETTINGS, rotations=["r2"], lr=0.5)
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner, _ = make_learner(make_model, learn, quant, KVConfig())
    learn_rotations(learner, windows(8), 0, lambda step, values: None)
    result = learner.result()
    assert torch.allclose(result.r1, learner.start.r1, atol=1e-6)
    assert not torch.allclose(result.r2, learner.start.r2, atol=1e-3)


def test_divergence_stops_the_run(make_model):
    learner, _ = make_learner(make_model, LearnConfig(**SETTINGS))
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
    learn = LearnConfig(steps=4, schedule=schedule)
    assert [rate_at(learn, i) for i in range(4)] == pytest.approx(expected, abs=1e-4)


def test_warmup_rises_before_the_schedule_starts():
    learn = LearnConfig(steps=6, schedule="linear", warmup=2)
    assert [rate_at(learn, i) for i in range(4)] == pytest.approx([0.5, 1, 1, 0.75])
