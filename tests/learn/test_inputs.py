"""Learned transforms of single inputs against dense matrices and autograd, in float64."""

from functools import partial

import pytest
import torch

from spinlab.config import ClipSearch, KVConfig, LearnConfig, QuantConfig, TensorQuant
from spinlab.formats.quantizer import StraightThrough
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.learn.progress import resume, save_progress
from spinlab.learn.spaces import linear as learned
from spinlab.model.seams import linear_at, linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import input_key
from spinlab.weights.rtn import round_to_nearest, search_ratios

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
SETTINGS = dict(
    steps=4,
    batch=4,
    micro_batch=2,
    sequence_length=16,
    quantize_weights=True,
    rotations=["inputs"],
    lr_scale=0.03,
    lr_inputs=0.01,
    optimizer="cayley_adam",
    max_grad_norm=None,
)


@pytest.fixture(params=[1, 1 << 26], ids=["one by one", "together"], autouse=True)
def _linears(request, monkeypatch):
    """Work on linears one by one, as on a CPU, or many together, as on a GPU."""
    monkeypatch.setitem(learned._TOGETHER, "cpu", request.param)


def transforms(model, shared=False) -> dict[str, ScaledDual]:
    """Draw a scale and a dual transform, in blocks of 8, for every input."""
    g = torch.Generator().manual_seed(3)
    found: dict[str, ScaledDual] = {}
    for _, layer, seam, linear in linears_of(model):
        width = linear.weight.shape[1]
        blocks = 1 if shared else width // 8
        first, second = (
            torch.stack([random_orthogonal(8, g) for _ in range(blocks)]) for _ in range(2)
        )
        order = torch.randperm(width, generator=g)
        scale = torch.rand(width, generator=g, dtype=torch.float64) + 0.5
        dual = DualTransform(first, order, second)
        found.setdefault(input_key(layer, seam.group), ScaledDual(scale, False, dual))
    return found


def learner_of(make_model, inputs, dtype=torch.float64, **changes):
    networks = QuantizedNetworks(lambda: make_model(dtype), QUANT, KVConfig())
    start = RotationSet(inputs=inputs)
    learn = LearnConfig(**{**SETTINGS, **changes})
    model = networks.learnable(start, inputs=True)
    teacher = make_model(dtype)
    return RotationLearner(model, start, learn, QUANT, ClipSearch(), teacher), networks


class Dense:
    """x diag(1/s) D with D dense, as a function of the log scale and both stacks of blocks."""

    def __init__(self, transform: ScaledDual) -> None:
        dual = transform.dual
        self.log_scale = transform.scale.log().requires_grad_()
        count = dual.width // 8
        self.first, self.second = (
            part.expand(count, -1, -1).clone().requires_grad_()
            for part in (dual.first, dual.second)
        )
        self.permutation = dual.permutation

    def dense(self):
        first, second = (torch.block_diag(*x) for x in (self.first, self.second))
        return first[:, self.permutation] @ second

    def __call__(self, x):
        return x @ (self.dense() / self.log_scale.exp()[:, None])

    def of_weight(self, weight):
        return weight @ (self.dense() * self.log_scale.exp()[:, None])


def by_autograd(networks, inputs):
    """Return the loss, and the dense transforms whose leaves hold its gradients."""
    model = networks.learnable(RotationSet(inputs=inputs), inputs=True)
    dense = {key: Dense(transform) for key, transform in inputs.items()}
    for _, layer, seam, linear in linears_of(model):
        here = dense[input_key(layer, seam.group)]
        weight = here.of_weight(linear.weight.detach())
        ratios = search_ratios(weight.detach(), QUANT.weights, ClipSearch())
        rounded = StraightThrough.apply(
            weight, lambda w, r=ratios: round_to_nearest(w, QUANT.weights, r).dequantize(w.dtype)
        )
        linear._parameters.pop("weight")
        object.__setattr__(linear, "weight", rounded)
        linear.path.rotation = here
    loss = model(input_ids=BATCH, labels=BATCH, use_cache=False).loss
    loss.backward()
    return loss.item(), dense


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def make_any(request, make_model):
    """As Qwen2, with biases that rotations would turn."""
    return partial(make_model, attention_bias=request.param, mlp_bias=request.param)


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_dense_matrices(make_any, shared):
    inputs = transforms(make_any(), shared)
    learner, networks = learner_of(make_any, inputs)
    rotations = learner.rotations
    rotations.begin()
    learner.form.begin(0)
    loss = learner._backward(BATCH)["loss"]
    learner.form.collect()
    rotations.finish(None)
    of_scales = dict(rotations.inputs.of_scales)
    expected, dense = by_autograd(networks, inputs)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' loss is taken in float32
    for key, here in dense.items():
        layer, _, group = key.partition(".")
        assert torch.allclose(of_scales[key], here.log_scale.grad, rtol=1e-5, atol=1e-9)
        for part in ("first", "second"):
            plain, point = getattr(here, part).grad, getattr(here, part).detach()
            tangent = 0.5 * (plain - point @ plain.mT @ point)
            found = rotations.parameters[f"{group}.{part}"].grad[int(layer)]
            assert tangent.abs().max() > 1e-6
            assert torch.allclose(found, tangent, rtol=1e-5, atol=1e-7 * tangent.abs().max())


def test_learned_transforms_are_what_the_network_learned_with(make_model):
    """The result, fused and run as any transform is, gives the loss that the loop sees next."""
    inputs = transforms(make_model())
    learner, networks = learner_of(make_model, inputs)
    learn_rotations(learner, BATCH.repeat(4, 1), 0, lambda step, values: None)
    found = learner.result()
    moved = [found.inputs[k].dual.first - t.dual.first for k, t in inputs.items()]
    assert min(m.abs().max() for m in moved) > 1e-3
    for transform in found.inputs.values():
        assert orthogonality_error(transform.dual.first) < 1e-12
    learner.rotations.begin()
    learner.form.begin(0)
    seen = learner._backward(BATCH)["loss"]
    model = networks.fused(found)
    weights = {}
    for name, *_, linear in linears_of(model):
        ratios = search_ratios(linear.weight, QUANT.weights, ClipSearch())
        weights[name] = round_to_nearest(linear.weight, QUANT.weights, ratios)
    loss = networks.dequantized(found, weights)(input_ids=BATCH, labels=BATCH).loss.item()
    assert loss == pytest.approx(seen, rel=1e-5)


def test_a_resumed_run_ends_with_the_same_bits(make_model, tmp_path):
    inputs, windows = transforms(make_model()), BATCH.repeat(4, 1)
    changes = dict(dtype=torch.float32, lr_clip=0.03, lr_input_clip=0.02)
    whole, _ = learner_of(make_model, inputs, **changes)
    curve: list = []
    learn_rotations(whole, windows, 0, lambda step, values: curve.append(values))
    first, _ = learner_of(make_model, inputs, **changes)
    part = [first.step(i, windows[4 * i : 4 * i + 4]) for i in range(2)]
    save_progress(first, tmp_path / "progress.safetensors", part)
    second, _ = learner_of(make_model, inputs, **changes)
    resumed = resume(second, tmp_path / "progress.safetensors")
    learn_rotations(second, windows, 2, lambda step, values: resumed.append(values))
    assert resumed == curve
    for key, transform in whole.result().inputs.items():
        same = second.result().inputs[key]
        assert torch.equal(transform.scale, same.scale)
        assert torch.equal(transform.dual.second, same.dual.second)
    assert second.result().clips == whole.result().clips
    assert min(whole.result().clips.values()) < 1
    assert linear_at(whole.model, "lm_head").weight.grad is None
