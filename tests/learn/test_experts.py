"""Learning with experts: their rows, terms on shared inputs, transforms, and what it takes."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spinlab.config import (
    KVConfig,
    LearnConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.kv import CodecConfig
from spinlab.config.rotation import BlocksConfig
from spinlab.learn import estimate_of, recompute_layers
from spinlab.model.hooks import temporary_hooks
from spinlab.model.load import cast_model
from spinlab.model.modules import decoder_of, layers_of, linears_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import check_invariance
from spinlab.rotation.fuse import fold_norms

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
SETTINGS = dict(steps=4, batch=4, micro_batch=2, sequence_length=16)
FREE = OptimizerConfig(max_grad_norm=None)
EXPERTS = {"num_experts": 24, "num_experts_per_tok": 1, "moe_intermediate_size": 20}


@pytest.fixture
def make(make_family_model):
    """Return a maker of a model with more experts than its tokens reach."""
    return partial(make_family_model, "qwen3_moe", **EXPERTS)


def test_experts_without_tokens_have_gradients_of_zero(make, learner_of):
    """Their weights are rounded in the loop; ranges of theirs stay, those of others move."""
    rates = RatesConfig(clip=0.05)
    learn = LearnConfig(**SETTINGS, quantize_weights=True, lr=rates, optimizer=FREE)
    learner, seen = learner_of(make, learn, QUANT), set()
    with temporary_hooks() as hooks:
        for site, linear in linears_of(learner.model):
            see = lambda m, args, at=site.path: seen.add(at)  # noqa: E731
            hooks.append(linear.register_forward_pre_hook(see))
        learner.step(0, BATCH)
        before = learner.space.clips()
        learner.step(1, BATCH)
    after = learner.space.clips()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    idle = before.keys() - seen
    assert idle and all(".experts." in name for name in idle)
    assert moved == before.keys() - idle


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("rounded", [False, True], ids=["activations", "weights"])
def test_terms_on_activations_see_a_shared_input_once(
    make_family_model, learner_of, rounded, family
):
    """By autograd, on what attention and the routers read, and on values; a shared expert too."""
    make = partial(make_family_model, family, **EXPERTS)
    learn = LearnConfig(
        **SETTINGS,
        quantize_weights=rounded,
        objective=ObjectiveConfig(cross_entropy=float(rounded), kurtosis=1.0),
        optimizer=FREE,
    )
    learner = learner_of(make, learn, QUANT)
    assert learner.local.places == 6
    if rounded:  # what is seen depends on the rounding of weights
        return
    found, _ = learner.gradients(0, BATCH)
    model = make()
    fold_norms(model)
    seen: list[torch.Tensor] = []
    r1, r2 = (learner.rotations.all[name].detach() for name in ("r1", "r2"))
    with temporary_hooks() as hooks, torch.no_grad():
        for site, linear in linears_of(model):
            if site.name.endswith(("q_proj", "gate.linear")):
                hooks.append(linear.register_forward_pre_hook(lambda m, a: seen.append(a[0] @ r1)))
            if site.name.endswith("v_proj"):
                turn = lambda m, a, out, by=r2[site.layer]: seen.append(  # noqa: E731
                    out.unflatten(-1, (-1, 8)) @ by
                )
                hooks.append(linear.register_forward_hook(turn))
        model(input_ids=BATCH)
    assert len(seen) == 6
    expected = torch.stack([kurtosis(y) for y in seen]).mean()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rounded", [False, True], ids=["activations", "weights"])
def test_a_router_that_multiplies_in_float32_is_seen_in_16_bits(
    make_family_model, learner_of, rounded
):
    objective = ObjectiveConfig(cross_entropy=float(rounded), kurtosis=1.0)
    learn = LearnConfig(**SETTINGS, quantize_weights=rounded, objective=objective, optimizer=FREE)
    half, single = (
        learner_of(lambda d=dtype: cast_model(make_family_model("glm4_moe"), d), learn, QUANT)
        for dtype in (torch.bfloat16, torch.float32)
    )
    (found, _), (expected, _) = (learner.gradients(0, BATCH) for learner in (half, single))
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)


def kurtosis(y: torch.Tensor) -> torch.Tensor:
    z = (y - y.mean(-1, keepdim=True)) / y.var(-1, unbiased=False, keepdim=True).sqrt()
    return (z.pow(4).mean(-1) - 1.8).abs().mean()


STARTS = {
    "scales": RotationConfig(inputs="scales"),
    "blocks": RotationConfig(r4="none", inputs="blocks", blocks=BlocksConfig(4)),
}


@pytest.mark.parametrize("inputs", STARTS)
def test_transforms_of_shared_and_own_inputs_learn_and_keep_the_function(make, learner_of, inputs):
    """The router's weight takes what is learned before all experts, and its input too."""
    learn = LearnConfig(
        **SETTINGS,
        quantize_weights=True,
        rotations=["r1", "r2", "inputs"],
        lr=RatesConfig(scale=0.05, input_clip=0.01),
        optimizer=FREE,
    )
    learner = learner_of(make, learn, QUANT, start=STARTS[inputs])
    for index in range(2):
        learner.step(index, BATCH)
    result = learner.result()
    moved = {key for key, t in result.inputs.items() if (t.scale - 1).abs().max() > 1e-4}
    assert {"0.gate_up", "1.gate_up", "0.qkv"} <= moved
    assert any(".down." in key for key in moved)
    networks = QuantizedNetworks(make, QUANT, KVConfig())
    assert check_invariance(make, lambda: networks.rotated(result), result, BATCH[:1]) < 1e-9


@pytest.mark.parametrize("inputs", STARTS)
def test_a_learning_network_with_transforms_and_nothing_rounded_is_the_original(
    make, learner_of, inputs
):
    """What a learned transform does to a router's input its weight undoes, step by step."""
    wide = TensorQuant(bits=16)
    off = QuantConfig(weights=TensorQuant(bits=15, symmetric=True), activations=wide)
    learn = LearnConfig(
        **SETTINGS,
        quantize_weights=True,
        rotations=["r1", "r2", "inputs"],
        lr=RatesConfig(scale=0.05),
        optimizer=FREE,
    )
    kv = KVConfig(keys=CodecConfig(bits=16), values=CodecConfig(bits=16))
    learner = learner_of(make, learn, off, kv, start=STARTS[inputs])
    for index in range(2):
        learner.step(index, BATCH)
    learner.rotations.begin()
    learner.space.begin(2)
    with torch.no_grad():
        found = decoder_of(learner.model)(input_ids=BATCH, use_cache=False)[0]
        expected = decoder_of(make())(input_ids=BATCH, use_cache=False)[0]
    gain = decoder_of(make()).norm.weight  # the learning network folds it into the head
    assert (found * gain - expected).norm() < 1e-3 * expected.norm()  # weights have 15 bits


@pytest.mark.parametrize("rounded", [False, True], ids=["activations", "weights"])
def test_layers_may_be_recomputed(make, learner_of, rounded):
    learn = LearnConfig(**SETTINGS, quantize_weights=rounded, optimizer=FREE)
    kept, again = learner_of(make, learn, QUANT), learner_of(make, learn, QUANT)
    recompute_layers(again.model)
    for learner in (kept, again):
        learner.gradients(0, BATCH)
    for name, parameter in kept.rotations.parameters.items():
        torch.testing.assert_close(again.rotations.parameters[name].grad, parameter.grad)


WIDE = {
    "vocab_size": 256,
    "hidden_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


@pytest.mark.parametrize("rounded", [False, True], ids=["activations", "weights"])
def test_an_estimate_counts_what_tokens_meet(make_family_model, learner_of, rounded, kept_bytes):
    """Operations against torch's counter, kept bytes against autograd, weights against numel."""
    make = lambda: make_family_model("qwen3_moe", **WIDE).float()  # noqa: E731
    rates = {"lr": RatesConfig(clip=0.01)} if rounded else {}
    learn = LearnConfig(
        steps=1, batch=2, micro_batch=2, sequence_length=128, quantize_weights=rounded, **rates
    )
    learner = learner_of(make, learn, QUANT)
    batch = torch.randint(0, 256, (2, 128), generator=torch.Generator().manual_seed(1))
    found = estimate_of(learner.model, learn, QUANT, 1)
    with FlopCounterMode(display=False) as counter:
        learner.gradients(0, batch)
    assert found.flops + found.wide_flops == pytest.approx(counter.get_total_flops(), rel=0.25)
    layers = sum(p.numel() for layer in layers_of(make()) for p in layer.parameters())
    active = sum(site.numbers * site.share for site in map_of(make()).sites)
    attention = 4 * (2 * 96 * 96 + 2 * 96 * 32)
    assert active == attention + 4 * (16 * 96 + 4 * 3 * 96 * 48)
    ends = 2 * 256 * 96
    assert found.weights == 4 * ((4 if rounded else 1) * layers + ends)
    taken = kept_bytes(learner, batch)
    assert found.activations == pytest.approx(taken, rel=0.25)
