"""R3 while it is learned: what the network computes, and the gradient, by plain autograd."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from spinlab.config import (
    CodecConfig,
    Config,
    KVConfig,
    LearnConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.kv.path import KVPath
from spinlab.learn import check_learning, recompute_layers
from spinlab.learn.optim import tangent
from spinlab.learn.spaces import PlainSpace
from spinlab.model.modules import linear_at, map_of
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.online import LayerRotations, OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import orthogonality_error
from spinlab.rotation.rotations import RotationSet
from tests.learn.test_kv_ranges import ByAutograd

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
SETTINGS = dict(steps=4, batch=4, sequence_length=16, micro_batch=2)
FREE = OptimizerConfig(max_grad_norm=None)
EUCLIDEAN = replace(FREE, grad_norm="euclidean")
WEIGHTS = QuantConfig(weights=TensorQuant(symmetric=True))
FLOATS = QuantConfig(weights=TensorQuant(bits=16), activations=TensorQuant(bits=16))
ONE = RotationConfig(r3="random")
EACH = RotationConfig(r3="random", r3_per_layer=True)
FOUR = CodecConfig(bits=4)
CACHES = {
    "affine": KVConfig(),
    "queries": KVConfig(queries=FOUR),
    "queries alone": KVConfig(keys=CodecConfig(bits=16), queries=FOUR),
    "a window": KVConfig(sinks=2, window=3),
    "runs": KVConfig(keys=CodecConfig(codec="kivi", bits=2, run=4)),
    "a layer in floats": KVConfig(first_layers=1),
    "three bits": KVConfig(keys=CodecConfig(bits=3, clip_ratio=0.9)),
    "groups of floats": KVConfig(keys=CodecConfig(codec="nvfp4")),
    "lloyd-max": KVConfig(keys=CodecConfig(codec="lloyd_max", bits=4)),
}


@pytest.fixture
def make_biased(make_family_model):
    def make():
        model = make_family_model("qwen2").double()
        for layer in map_of(model).layers:
            linear_at(model, layer.attention.keys).bias.data *= 30
        return model

    return make


def gradients(learner):
    terms, norm = learner.gradients(0, BATCH)
    return terms, {n: p.grad.clone() for n, p in learner.rotations.parameters.items()}, norm


def learn(**changes):
    settings = {"rotations": ["r1", "r2", "r3"], "optimizer": EUCLIDEAN, **SETTINGS}
    return LearnConfig(**{**settings, **changes})


# the plain definition: R3 a free matrix on both sides -------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rotation", [ONE, EACH], ids=["one", "each"])
@pytest.mark.parametrize("rounded", [False, True])
def test_loss_gradient_and_norm_are_those_of_the_plain_definition(
    make_model, learner_of, rounded, rotation, cache
):
    parts = learn(quantize_weights=rounded), WEIGHTS, CACHES[cache], rotation
    make = partial(make_model, torch.float64, head_dim=16 if "groups" in cache else 8)
    found = gradients(learner_of(make, *parts))
    plain = gradients(learner_of(make, *parts, space=PlainSpace))
    assert found[0] == pytest.approx(plain[0], rel=1e-10)
    assert found[2] == pytest.approx(plain[2], rel=1e-8)
    assert found[1].keys() == {"r1", "r2", "r3"}
    for name, gradient in plain[1].items():
        assert gradient.norm() > 1e-5
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-8, f"{name}: {error:.1e}"


@pytest.mark.parametrize("latents", ["none", "random"])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_key_that_all_heads_share_is_turned_by_what_is_learned(
    make_family_model, learner_of, family, rounded, latents
):
    """R3 turns it, and the last numbers of queries, which are rounded with the rest of a head."""
    rotation, coded = replace(EACH, latents=latents), KVConfig(queries=FOUR)
    parts = learn(quantize_weights=rounded), WEIGHTS, coded, rotation
    make = partial(make_family_model, family)
    found = gradients(learner_of(make, *parts))
    plain = gradients(learner_of(make, *parts, space=PlainSpace))
    assert found[0] == pytest.approx(plain[0], rel=1e-10)
    assert found[2] == pytest.approx(plain[2], rel=1e-8)
    assert plain[1]["r3"].shape == (2, 4, 4)
    for name, gradient in plain[1].items():
        assert gradient.norm() > 1e-6
        assert (found[1][name] - gradient).norm() < 1e-8 * gradient.norm(), name


@pytest.mark.parametrize("rotation", [ONE, EACH], ids=["one", "each"])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_bias_that_is_apart_is_turned_by_what_is_learned(
    make_biased, learner_of, rounded, rotation
):
    parts = learn(quantize_weights=rounded), WEIGHTS, KVConfig(), rotation
    found = gradients(learner_of(make_biased, *parts))
    plain = gradients(learner_of(make_biased, *parts, space=PlainSpace))
    assert all(kv_path_of(learner_of(make_biased, *parts).model).biases)
    assert found[0] == pytest.approx(plain[0], rel=1e-7)  # angles of RoPE are float32's
    assert found[2] == pytest.approx(plain[2], rel=1e-5)
    for name, gradient in plain[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-6 * gradient.norm())


@pytest.mark.parametrize("rotation", [ONE, EACH], ids=["one", "each"])
def test_r3_can_be_learned_alone(make_model, learner_of, rotation):
    make = partial(make_model, torch.float64)
    parts = learn(rotations=["r3"]), FLOATS, KVConfig(), rotation
    found = gradients(learner_of(make, *parts))
    plain = gradients(learner_of(make, *parts, space=PlainSpace))
    assert found[1].keys() == {"r3"}
    assert torch.allclose(found[1]["r3"], plain[1]["r3"], rtol=1e-7, atol=1e-12)


# what is learned --------------------------------------------------------------------------------


def test_one_r3_is_tied_ones(make_model, learner_of):
    """The gradient of one for all is the sum of those of each layer, where these are equal."""
    make = partial(make_model, torch.float64)
    one = initial_rotations(ONE, map_of(make()), torch.Generator().manual_seed(4))
    layers = len(map_of(make()).layers)
    each = replace(one, r3=LayerRotations([one.r3] * layers))
    for rounded in (False, True):
        parts = learn(quantize_weights=rounded, optimizer=FREE), WEIGHTS, None
        whole = gradients(learner_of(make, *parts, one))
        apart = gradients(learner_of(make, *parts, each))
        assert whole[0] == pytest.approx(apart[0], rel=1e-12)
        assert apart[1]["r3"].shape == (layers, *whole[1]["r3"].shape)
        assert torch.allclose(whole[1]["r3"], apart[1]["r3"].sum(0), rtol=1e-9, atol=1e-13)
        assert torch.allclose(whole[1]["r1"], apart[1]["r1"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rotation", [ONE, EACH, RotationConfig(r3="identity")])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_network_that_is_learned_on_is_the_one_that_results(
    make_model, learner_of, rounded, rotation
):
    """A learner from the result, with R3 held, starts with the loss that the first ends with."""
    make = partial(make_model, torch.float64)
    settings = learn(quantize_weights=rounded, optimizer=FREE, lr=RatesConfig(0.1, r3=5.0))
    first = learner_of(make, settings, WEIGHTS, None, rotation)
    for index in range(3):
        first.step(index, BATCH)
    first.rotations.project()
    last = gradients(first)[0]["loss"]
    result = first.result()
    held = learner_of(make, replace(settings, rotations=["r1"]), WEIGHTS, None, result)
    assert gradients(held)[0]["loss"] == pytest.approx(last, rel=1e-9)
    assert type(result.r3) is (LayerRotations if rotation.r3_per_layer else OnlineRotation)
    moved = result.r3.dense() - first.start.r3.dense()
    assert moved.flatten(-2).norm(dim=-1).min() > 1e-3
    assert result.orthogonality()["r3.right"] < 1e-12


def test_learning_r3_alone_lowers_the_error_of_coarse_keys(make_model, learner_of):
    make = partial(make_model, torch.float64)
    objective = ObjectiveConfig(cross_entropy=0, kl=1.0)
    settings = learn(
        steps=25, rotations=["r3"], optimizer=FREE, objective=objective, lr=RatesConfig(r3=30.0)
    )
    kv = KVConfig(keys=CodecConfig(bits=2), values=CodecConfig(bits=16))
    learner = learner_of(make, settings, FLOATS, kv, EACH, apart=True)
    curve = [learner.step(index, BATCH)["loss"] for index in range(25)]
    assert min(curve[-5:]) < 0.7 * curve[0]
    assert orthogonality_error(learner.rotations.r3) < 1e-3


def test_an_r3_that_is_not_learned_stays_where_it_runs(make_model, learner_of):
    make = partial(make_model, torch.float64)
    learner = learner_of(make, learn(rotations=["r1", "r2"]), WEIGHTS, None, ONE)
    assert learner.rotations.r3 is None
    assert kv_path_of(learner.model).r3 is learner.start.r3
    learner.step(0, BATCH)
    assert learner.result().r3 is learner.start.r3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed ranges", "learned ranges"])
def test_the_gradient_knows_what_r3_does_to_ranges(make_model, learner_of, learned, symmetric):
    """Of a formula that autograd differentiates, with R3 a leaf on both sides."""
    make = partial(make_model, torch.float64)
    rates = RatesConfig(0.1, kv_clip=0.05 if learned else 0)
    settings = learn(quantize_weights=True, optimizer=FREE, lr=rates)
    codec = CodecConfig(bits=3, clip_ratio=0.8, symmetric=symmetric)
    kv = KVConfig(keys=codec, values=CodecConfig(bits=16))
    found = gradients(learner_of(make, settings, WEIGHTS, kv, EACH))
    plain = learner_of(make, settings, WEIGHTS, kv, EACH)
    leaf = plain.start.r3.dense().clone().requires_grad_()
    ratio = torch.tensor(0.8, dtype=torch.float32 if learned else torch.float64)
    keys = ByAutograd(ratio.double(), bits=3, symmetric=symmetric)

    class Free:
        def at(self, layer):
            return lambda x: x @ leaf[layer]

    set_kv_path(plain.model, KVPath(Free(), keys))
    assert plain.gradients(0, BATCH)[0] == pytest.approx(found[0], rel=1e-9)
    expected = tangent(leaf.detach(), leaf.grad @ leaf.detach().mT)
    error = (found[1]["r3"] - expected).norm() / expected.norm()
    assert error < 1e-6


def test_layers_that_are_run_again_give_the_same_gradient(make_model, learner_of):
    parts = learn(), WEIGHTS, CACHES["queries"], EACH
    make = partial(make_model, torch.float64)
    again = learner_of(make, *parts)
    recompute_layers(again.model)
    found, expected = gradients(again), gradients(learner_of(make, *parts))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize(("bits", "least"), [(4, 0.9), (2, 0.98)])
def test_a_16_bit_network_finds_the_gradient_of_a_wide_one(make_model, learner_of, bits, least):
    make = partial(make_model, torch.float64)
    kv = KVConfig(keys=CodecConfig(bits=bits), values=CodecConfig(bits=16))
    settings = [learn(rotations=["r3"], dtype=dtype) for dtype in (None, "bfloat16")]
    exact, found = (
        gradients(learner_of(make, s, FLOATS, kv, EACH))[1]["r3"].double().flatten()
        for s in settings
    )
    assert torch.cosine_similarity(found, exact, 0) > least


def test_a_file_without_r3_leaves_nothing_to_learn():
    names = {"rotations": ["r1", "r3"]}
    config = Config(rotation=RotationConfig(load="R.safetensors"), learn=learn(**names))
    with pytest.raises(
        InputError, match=r"rotation\.load=R\.safetensors brings none: leave r3 out"
    ):
        check_learning(config, RotationSet())
    check_learning(config, RotationSet(r3=hadamard_rotation(8)))
    settings = replace(config, rotation=RotationConfig(load="R.bin"))
    check_learning(settings, RotationSet())  # what runs online is the settings'
