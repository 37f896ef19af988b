"""SpinQuant's published step, written anew from the paper and from what its code was seen to do.

The network's weights are made with R1 and R2 as free matrices and differentiated by autograd, all
gradients are clipped together as they are, and Cayley SGD takes them.
"""

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from spinlab.compose import composed
from spinlab.config import (
    CodecConfig,
    KVConfig,
    LearnConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
)
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.learn.optim.cayley import skew_generator
from spinlab.model.modules import map_of
from spinlab.rotation.initial import initial_rotations

IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
HEAD = 8
READERS = {"q_proj": "input", "k_proj": "input", "v_proj": "input"}
READERS |= {"gate_proj": "post_attention", "up_proj": "post_attention"}
STEPS = 4


def in_heads(weight, r2):
    """W (I ⊗ R2): (out, in)."""
    return (weight.unflatten(-1, (-1, HEAD)) @ r2).flatten(-2)


def rotated(model, r1, r2):
    """Every parameter of a network rotated by R1 (n, n) and a list of R2, norms folded."""
    own = dict(model.named_parameters())
    found = {}
    for name, weight in own.items():
        kind, layer = name.split(".")[-2], name.split(".layers.")[-1].split(".")[0]
        if kind == "lm_head":
            weight = weight * own["model.norm.weight"] @ r1
        elif kind == "embed_tokens":
            weight = weight @ r1
        elif kind in READERS:
            gain = own[f"model.layers.{layer}.{READERS[kind]}_layernorm.weight"]
            weight = weight * gain @ r1
            if kind == "v_proj":
                weight = in_heads(weight.mT, r2[int(layer)]).mT
        elif kind == "o_proj":
            weight = in_heads(r1.mT @ weight, r2[int(layer)])
        elif kind == "down_proj":
            weight = r1.mT @ weight
        else:
            weight = torch.ones_like(weight)
        found[name] = weight
    return found


def quantize_inputs(model):
    """Round what every linear of a layer reads, with a straight-through gradient."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            width = HEAD if name.endswith("o_proj") else 0
            rounding = TokenQuantizer(IntegerFormat(4, symmetric=False), width).round_trip
            module.register_forward_pre_hook(
                lambda m, args, q=rounding: args[0] + q(args[0].detach()) - args[0].detach()
            )


def published_gradients(model, matrices, limit):
    """Return the loss, the norm, and the gradients of R1 and of every R2, clipped together."""
    matrices = [torch.nn.Parameter(m.clone()) for m in matrices]
    weights = rotated(model, matrices[0], matrices[1:])
    logits = functional_call(model, weights, (), {"input_ids": IDS}).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    norm = clip_grad_norm_(matrices, limit)
    return loss.item(), norm.item(), [m.grad for m in matrices]


def published_step(point, gradient, rate, size=None):
    """Return the matrix after a step, and the step's size.

    Cayley on the transpose: rows of norm 1, a cap from the generator on that side, a start off
    the tangent, five iterations. Its QR, by chance in 1 of 101 steps, is left out.
    """
    x = (point / point.norm(dim=1, keepdim=True)).mT
    turned = -gradient.mT @ x.mT
    hat = turned - x @ (x.mT @ turned) / 2
    skew = hat - hat.mT
    size = size or min(rate, 1 / (skew.abs().sum(0).max().item() + 1e-8))
    y = x - size * gradient.mT
    for _ in range(5):
        y = x + size / 2 * skew @ (x + y)
    return y.mT, size


@pytest.fixture
def learner_with(make, start, learner_of):
    """Return a maker of learners with changed settings."""

    def made(**changes):
        settings: dict = dict(steps=STEPS, batch=4, micro_batch=2, sequence_length=16)
        settings["optimizer"] = OptimizerConfig(grad_norm="euclidean")
        learn = LearnConfig(**settings | changes)
        off = KVConfig(CodecConfig(bits=16), CodecConfig(bits=16))
        return learner_of(make, learn, QuantConfig(), off, start)

    return made


def learned(learner):
    return [r.clone() for r in (learner.rotations.r1.detach(), *learner.rotations.r2.detach())]


def apart(found, expected, before):
    """Return how far two matrices are apart, for each in units of the step that led there."""
    parts = zip(found, expected, before, strict=True)
    return [((f - e).norm() / (e - b).norm()).item() for f, e, b in parts]


@pytest.fixture
def make(make_model):
    return lambda: make_model(torch.float64, tie_word_embeddings=False)


@pytest.fixture
def network(make):
    model = make()
    quantize_inputs(model)
    return model


@pytest.fixture
def start(make):
    rotation = RotationConfig(r3="none", r4="none")
    model_map = map_of(make())
    return initial_rotations(rotation, model_map, torch.Generator().manual_seed(0))


def test_the_preset_takes_the_published_steps(learner_with, network, start):
    """Loss, norm and rotations over a whole run, whose gradients are clipped to a third or less."""
    preset = composed("learn=spinquant").learn
    learner = learner_with(lr=preset.lr, optimizer=preset.optimizer)
    points = [start.r1, *start.r2]
    for step in range(STEPS):
        loss, norm, gradients = published_gradients(network, points, 1.0)
        rate = 1.5 * (1 - step / STEPS)
        after = [published_step(p, g, rate) for p, g in zip(points, gradients, strict=True)]
        assert norm > 3
        assert all(size == rate for _, size in after)  # the cap is far away
        curve = learner.step(step, IDS)
        assert curve["loss"] == pytest.approx(loss, rel=1e-9)
        assert curve["grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert max(apart(learned(learner), [p for p, _ in after], points)) < 1e-6
        points = [p for p, _ in after]


def test_a_capped_step_differs_from_the_published_one_by_its_side_and_its_start(
    learner_with, network, start
):
    """The cap is 1/||W||_1 of the generator left of R, where the code takes that on the right."""
    points = [start.r1, *start.r2]
    _, _, gradients = published_gradients(network, points, 1.0)
    learner = learner_with(lr=RatesConfig(1e5))
    curve = learner.step(0, IDS)
    pairs = list(zip(points, gradients, strict=True))
    sizes = [1 / skew_generator(p, g).abs().sum(0).max().item() for p, g in pairs]
    assert curve["alpha/r1"] == pytest.approx(sizes[0], rel=1e-6)
    theirs = [published_step(p, g, 1e5)[1] for p, g in pairs]
    ratios = [ours / other for ours, other in zip(sizes, theirs, strict=True)]
    assert ratios == pytest.approx([1, 1, 1], abs=0.15)
    assert all(abs(ratio - 1) > 0.01 for ratio in ratios)
    parts = zip(points, gradients, sizes, strict=True)
    same_size = [published_step(p, g, 1e5, size)[0] for p, g, size in parts]
    assert max(apart(learned(learner), same_size, points)) < 0.05  # the start, after 5 iterations


def test_riemannian_norms_leave_a_step_that_many_times_longer(learner_with, start):
    """What a clip of one kind of norm takes for the other: both steps have the same direction."""
    moved, norms = {}, {}
    for kind in ("euclidean", "riemannian"):
        optimizer = OptimizerConfig(grad_norm=kind, max_grad_norm=1e-3)
        learner = learner_with(lr=RatesConfig(1e-3), optimizer=optimizer)
        norms[kind] = learner.step(0, IDS)["grad_norm"]
        moved[kind] = learned(learner)[0] - start.r1
    ratio = norms["euclidean"] / norms["riemannian"]
    assert ratio > 20
    assert torch.allclose(moved["riemannian"], ratio * moved["euclidean"], rtol=1e-3, atol=1e-9)
