"""Both fast spaces against the plain definition: weights rotated at every forward, by autograd."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from spinlab.config import (
    FormatChange,
    LearnConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Override,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.learn import GRAD_NORMS
from spinlab.learn.spaces import PlainSpace
from spinlab.learn.spaces.owners import TOGETHER
from spinlab.model.modules import linears_of

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
SETTINGS = dict(steps=4, batch=4, sequence_length=16, micro_batch=2)
FREE = OptimizerConfig(max_grad_norm=None)
EUCLIDEAN = replace(FREE, grad_norm="euclidean")


LINEARS = {"one by one": 1, "together": 1 << 26}


@pytest.fixture(params=LINEARS.values(), ids=LINEARS, autouse=True)
def _linears(request, monkeypatch):
    """Work on linears one by one, as on a CPU, or many together, as on a GPU."""
    monkeypatch.setitem(TOGETHER, "cpu", request.param)


def biased(make_model):
    def make(dtype):
        model = make_model(dtype, attention_bias=True)
        generator = torch.Generator().manual_seed(5)
        for _, linear in linears_of(model):
            if linear.bias is not None:
                linear.bias.data.copy_(torch.randn(linear.bias.shape, generator=generator))
        return model

    return make


@pytest.fixture
def learner_in(learner_of):
    """Return a maker of learners in a space, beside a teacher."""

    def made(make, space, learn, quant, rotation=None, dtype=torch.float64):
        start = dict(start=rotation, apart=True, space=space)
        return learner_of(partial(make, dtype), learn, quant, **start)

    return made


def loss_and_gradients(learner):
    terms, norm = learner.gradients(0, BATCH)
    return terms, {n: p.grad.clone() for n, p in learner.rotations.parameters.items()}, norm


OBJECTIVES = {
    "cross entropy": ObjectiveConfig(),
    "kl": ObjectiveConfig(cross_entropy=0.3, kl=1.0, kl_top_k=5),
    "layer mse": ObjectiveConfig(cross_entropy=0.0, layer_mse=1.0),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weights", ["16-bit weights", "quantized weights"])
@pytest.mark.parametrize("rotation", [RotationConfig(), RotationConfig(cross_head="hadamard")])
def test_loss_and_gradient_are_those_of_the_plain_definition(
    make_model, learner_in, rotation, weights, objective
):
    rounded = weights == "quantized weights"
    learn = LearnConfig(
        **SETTINGS,
        quantize_weights=rounded,
        objective=OBJECTIVES[objective],
        optimizer=EUCLIDEAN,
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    make = biased(make_model)
    found = loss_and_gradients(learner_in(make, None, learn, quant, rotation))
    plain = loss_and_gradients(learner_in(make, PlainSpace, learn, quant, rotation))
    assert found[0] == pytest.approx(plain[0], rel=1e-10)
    assert found[2] == pytest.approx(plain[2], rel=1e-8)
    for name, gradient in plain[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 1e-4
        assert error < 1e-8, f"{name}: {error:.1e}"


MULTIPLIERS = {
    **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3},
    **{"attention_multiplier": 0.2, "logits_scaling": 5.0},
}
# some of which get no token of a batch
EXPERTS = {"num_experts": 24, "num_experts_per_tok": 1, "moe_intermediate_size": 20}
OF_FAMILIES = {
    "cohere": ({"logit_scale": 0.3, "attention_bias": True}, RotationConfig()),
    "stablelm": ({"use_parallel_residual": True}, RotationConfig()),
    "olmo2": ({"attention_bias": True}, RotationConfig(r1="none")),
    "gemma": ({"attention_bias": True}, RotationConfig()),
    "gemma2": (
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "sliding_window": 5},
        RotationConfig(r1="none"),
    ),
    "gemma3_text": ({"sliding_window": 5}, RotationConfig(r1="none")),
    "granite": ({**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}, RotationConfig()),
    "qwen3_moe": ({**EXPERTS, "attention_bias": True}, RotationConfig()),
    "mixtral": ({"num_local_experts": 3, "num_experts_per_tok": 2}, RotationConfig()),
    "llama4_text": (
        {"attention_bias": True, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2},
        RotationConfig(),
    ),
    "deepseek_v2": ({"q_lora_rank": None, "mlp_bias": True}, RotationConfig()),
    "deepseek_v3": ({"attention_bias": True}, RotationConfig()),
}
# every three of the four in a case meet
OF_FAMILY = [
    pytest.param(
        name, rounded, objective, LINEARS[linears], id=f"{name}-{rounded}-{objective}-{linears}"
    )
    for i, name in enumerate(OF_FAMILIES)
    for rounded in (False, True)
    for j, objective in enumerate(OBJECTIVES)
    for linears in [tuple(LINEARS)[(i + rounded + j) % 2]]
]


@pytest.mark.parametrize(
    ("family", "rounded", "objective", "_linears"), OF_FAMILY, indirect=["_linears"]
)
def test_families_of_other_layers_learn_by_the_plain_definition(
    make_family_model, learner_in, family, rounded, objective
):
    changes, rotation = OF_FAMILIES[family]

    def make(dtype):
        return make_family_model(family, **changes).to(dtype)

    learn = LearnConfig(
        **SETTINGS,
        rotations=[name for name in ("r1", "r2") if getattr(rotation, name) != "none"],
        quantize_weights=rounded,
        objective=OBJECTIVES[objective],
        optimizer=EUCLIDEAN,
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    found, plain = (
        loss_and_gradients(learner_in(make, space, learn, quant, rotation))
        for space in (None, PlainSpace)
    )
    assert found[0] == pytest.approx(plain[0], rel=1e-10)
    assert found[2] == pytest.approx(plain[2], rel=1e-8)
    for name, gradient in plain[1].items():
        assert gradient.norm() > 1e-6
        assert (found[1][name] - gradient).norm() < 1e-8 * gradient.norm(), name


WIDE = [Override("*.0.mlp.*_proj", activations=FormatChange(bits=16))]


@pytest.mark.parametrize("bits", [4, 16])
def test_inputs_that_nothing_rounds_are_part_of_the_euclidean_norm(make_model, learner_in, bits):
    """Of one layer's MLP, or of all linears: what is rounded then are keys and values."""
    off = TensorQuant(bits=16)
    quant = QuantConfig(weights=off, activations=TensorQuant(bits=bits), overrides=WIDE)
    learn = LearnConfig(**SETTINGS, optimizer=EUCLIDEAN)
    norms = [
        loss_and_gradients(learner_in(biased(make_model), space, learn, quant))[2]
        for space in (None, PlainSpace)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-8)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", GRAD_NORMS)
def test_a_clip_scales_gradients_by_the_norm_it_names(make_model, learner_in, kind, rounded):
    optimizer = replace(FREE, grad_norm=kind)
    learn = LearnConfig(**SETTINGS, optimizer=optimizer, quantize_weights=rounded)
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner = learner_in(make_model, None, learn, quant)
    _, whole, norm = loss_and_gradients(learner)
    length = torch.stack([gradient.norm() for gradient in whole.values()]).norm().item()
    assert (norm == pytest.approx(length)) == (kind == "riemannian")
    assert norm > 0.999 * length  # a projection is never longer
    for most in (norm / 5, norm * 5):
        clipping = replace(learn, optimizer=replace(optimizer, max_grad_norm=most))
        limited = learner_in(make_model, None, clipping, quant)
        _, clipped, found = loss_and_gradients(limited)
        assert found == pytest.approx(norm)
        scale = min(1, most / norm)
        assert all(
            torch.allclose(clipped[n], scale * g, rtol=1e-4, atol=1e-12) for n, g in whole.items()
        )


def test_learned_ranges_give_the_plain_definitions_curve(make_model, learner_in):
    """Rotations and weight ranges together over a few steps; the plain one differentiates the
    rounding by autograd."""
    learn = LearnConfig(**SETTINGS, quantize_weights=True, lr=RatesConfig(0.1, clip=0.03))
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    curves = []
    for space in (None, PlainSpace):
        learner = learner_in(biased(make_model), space, learn, quant)
        curves.append([learner.step(i, BATCH) for i in range(4)])
    for fast, plain in zip(*curves, strict=True):
        assert fast == pytest.approx(plain, rel=1e-7, abs=1e-12)


DTYPES = [
    ("float32", "float64"),
    ("float64", "float32"),
    ("bfloat16", None),
    ("float32", "bfloat16"),
]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("stored", "run"), DTYPES)
def test_a_network_may_learn_in_another_dtype(make_model, learner_in, stored, run, rounded):
    """Loss and Euclidean norm are float64's to what the narrower dtype can hold; so are biases."""
    settings = {**SETTINGS, "quantize_weights": rounded, "optimizer": EUCLIDEAN}
    learn, exact = LearnConfig(**settings, dtype=run), LearnConfig(**settings)
    quant, make = QuantConfig(weights=TensorQuant(symmetric=True)), biased(make_model)
    found = learner_in(make, None, learn, quant, dtype=getattr(torch, stored))
    assert found.head.dtype == getattr(torch, run or stored)
    assert found.rotations.r1.dtype == torch.promote_types(found.head.dtype, torch.float32)
    terms, gradients, norm = loss_and_gradients(found)
    expected, _, exact_norm = loss_and_gradients(learner_in(make, None, exact, quant))
    narrow = "bfloat16" in (stored, run)
    assert terms["loss"] == pytest.approx(expected["loss"], rel=0.05 if narrow else 0.02)
    assert norm == pytest.approx(exact_norm, rel=0.15 if narrow else 0.02)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("names", [["r1"], ["r2"]])
def test_a_rotation_that_is_held_fixed_still_turns(make_model, learner_in, names):
    rounded = QuantConfig(weights=TensorQuant(symmetric=True))
    for quantized in (False, True):
        learn = LearnConfig(
            **SETTINGS, rotations=names, quantize_weights=quantized, optimizer=EUCLIDEAN
        )
        runs = [
            loss_and_gradients(learner_in(biased(make_model), space, learn, rounded))
            for space in (None, PlainSpace)
        ]
        assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-10)
        assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-8)
        assert runs[0][1].keys() == set(names)
        for name in names:
            assert torch.allclose(runs[0][1][name], runs[1][1][name], atol=1e-9)


def test_learning_leaves_its_start_alone(make_model, learner_in):
    learn = LearnConfig(**SETTINGS, optimizer=FREE)
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    learner = learner_in(make_model, None, learn, quant)
    before = learner.start.r1.clone()
    learner.step(0, BATCH)
    assert torch.equal(learner.start.r1, before)
    assert not torch.equal(learner.rotations.r1.detach(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_coarser_products_of_weights_move_a_16_bit_network_by_less_than_its_bits(
    make_model, learner_of, monkeypatch
):
    """Against float32's own: few weights stood so near a boundary that another level was taken.

    A step of levels is a seventh of a row's largest weight. What gradients differ by is inputs that
    take other levels, as whatever flips a bit makes them.
    """
    learn = LearnConfig(**SETTINGS, optimizer=FREE, quantize_weights=True, dtype="bfloat16")
    quant = QuantConfig(weights=TensorQuant(symmetric=True))

    def made():
        learner = learner_of(lambda: make_model(torch.float32).cuda(), learn, quant, apart=True)
        terms, gradients, _ = loss_and_gradients(learner)
        weights = [linear.weight.float() for _, linear in linears_of(learner.model)]
        return terms["loss"], gradients, torch.cat([weight.flatten() for weight in weights])

    coarse = made()
    monkeypatch.setattr("spinlab.learn.loop.float32_products_for", lambda *_: nullcontext())
    whole = made()
    assert not torch.equal(coarse[2], whole[2])  # the products were others
    moved = (coarse[2] - whole[2]).abs() > 0.02 * whole[2].abs().max()
    assert moved.float().mean() < 2e-3
    assert coarse[0] == pytest.approx(whole[0], rel=1e-2)
    for name, gradient in whole[1].items():
        assert torch.cosine_similarity(coarse[1][name].flatten(), gradient.flatten(), 0) > 0.8
