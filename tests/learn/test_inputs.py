"""Learned transforms of single inputs against dense matrices and autograd, in float64."""

from functools import partial

import pytest
import torch

from spinlab.config import (
    ClipSearch,
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
from spinlab.formats.quantizer import StraightThrough
from spinlab.learn import learn_rotations, resume, save_progress
from spinlab.learn.learned.transforms import scaled, scaled_gradients
from spinlab.learn.spaces.owners import TOGETHER
from spinlab.model.modules import head_of, linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal
from spinlab.rotation.rotations import RotationSet
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
    lr=RatesConfig(scale=0.03, inputs=0.01),
    optimizer=OptimizerConfig("cayley_adam", max_grad_norm=None),
)


@pytest.fixture(params=[1, 1 << 26], ids=["one by one", "together"], autouse=True)
def _linears(request, monkeypatch):
    """Work on linears one by one, as on a CPU, or many together, as on a GPU."""
    monkeypatch.setitem(TOGETHER, "cpu", request.param)


def transforms(model, shared=False) -> dict[str, ScaledDual]:
    """Draw a scale and a dual transform, in blocks of 8, for every input."""
    g = torch.Generator().manual_seed(3)
    found: dict[str, ScaledDual] = {}
    for site, module in linears_of(model):
        width = module.weight.shape[1]
        blocks = 1 if shared else width // 8
        first, second = (
            torch.stack([random_orthogonal(8, g) for _ in range(blocks)]) for _ in range(2)
        )
        order = torch.randperm(width, generator=g)
        scale = torch.rand(width, generator=g, dtype=torch.float64) + 0.5
        dual = DualTransform(first, order, second)
        found.setdefault(site.key, ScaledDual(scale, False, dual))
    return found


@pytest.fixture
def learner_from(learner_of):
    """Return a maker of learners that start from the transforms of single inputs."""

    def made(make_model, inputs, dtype=torch.float64, **changes):
        learn, start = LearnConfig(**{**SETTINGS, **changes}), RotationSet(inputs=inputs)
        return learner_of(partial(make_model, dtype), learn, QUANT, start=start)

    return made


def networks_of(make_model):
    return QuantizedNetworks(make_model, QUANT, KVConfig())


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


def by_autograd(make_model, inputs):
    """Return the loss, and the dense transforms whose leaves hold its gradients."""
    model = networks_of(make_model).learnable(RotationSet(inputs=inputs), inputs=True)
    dense = {key: Dense(transform) for key, transform in inputs.items()}
    for site, module in linears_of(model):
        here = dense[site.key]
        weight = here.of_weight(module.weight.detach())
        ratios = search_ratios(weight.detach(), QUANT.weights, ClipSearch())
        rounded = StraightThrough.apply(
            weight, lambda w, r=ratios: round_to_nearest(w, QUANT.weights, r).dequantize(w.dtype)
        )
        module._parameters.pop("weight")
        object.__setattr__(module, "weight", rounded)
        module.path.rotation = here
    loss = model(input_ids=BATCH, labels=BATCH, use_cache=False).loss
    loss.backward()
    return loss.item(), dense


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def make_any(request, make_model):
    """As Qwen2, with biases that rotations would turn."""
    return partial(make_model, attention_bias=request.param, mlp_bias=request.param)


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_dense_matrices(make_any, learner_from, shared):
    inputs = transforms(make_any(), shared)
    learner = learner_from(make_any, inputs)
    loss = learner.gradients(0, BATCH)[0]["loss"]
    rotations, scales = learner.rotations, learner.rotations.inputs.scales.logs
    expected, dense = by_autograd(make_any, inputs)
    assert loss == pytest.approx(expected, rel=1e-6)  # transformers' loss is taken in float32
    for key, here in dense.items():
        layer, _, group = key.partition(".")
        assert torch.allclose(
            scales[group].grad[int(layer)], here.log_scale.grad, rtol=1e-5, atol=1e-9
        )
        for part in ("first", "second"):
            plain, point = getattr(here, part).grad, getattr(here, part).detach()
            tangent = 0.5 * (plain - point @ plain.mT @ point)
            found = rotations.parameters[f"{group}.{part}"].grad[int(layer)]
            assert tangent.abs().max() > 1e-6
            assert torch.allclose(found, tangent, rtol=1e-5, atol=1e-7 * tangent.abs().max())


def test_learned_transforms_are_what_the_network_learned_with(make_model, learner_from):
    """The result, fused and run as any transform is, gives the loss that the loop sees next."""
    inputs = transforms(make_model())
    learner, networks = learner_from(make_model, inputs), networks_of(make_model)
    learn_rotations(learner, BATCH.repeat(4, 1), 0, lambda step, values: None)
    found = learner.result()
    moved = [found.inputs[k].dual.first - t.dual.first for k, t in inputs.items()]
    assert min(m.abs().max() for m in moved) > 1e-3
    for transform in found.inputs.values():
        assert orthogonality_error(transform.dual.first) < 1e-12
    seen = learner.gradients(0, BATCH)[0]["loss"]
    model = networks.fused(found)
    weights = {}
    for site, module in linears_of(model):
        ratios = search_ratios(module.weight, QUANT.weights, ClipSearch())
        weights[site.path] = round_to_nearest(module.weight, QUANT.weights, ratios)
    loss = networks.dequantized(found, weights)(input_ids=BATCH, labels=BATCH).loss.item()
    assert loss == pytest.approx(seen, rel=1e-5)


def test_rotations_without_a_rate_stay_where_they_start(make_model, learner_from):
    held = RatesConfig(scale=0.03, inputs=0)
    learner = learner_from(make_model, transforms(make_model()), lr=held)
    start = learner.result().inputs
    learn_rotations(learner, BATCH.repeat(4, 1), 0, lambda step, values: None)
    for key, found in learner.result().inputs.items():
        assert torch.allclose(found.dual.first, start[key].dual.first, atol=1e-12)
        assert torch.allclose(found.dual.second, start[key].dual.second, atol=1e-12)
        assert not torch.allclose(found.scale, start[key].scale, atol=1e-3)


def test_held_rotations_count_in_no_norm_and_no_clip(make_model, learner_of):
    """R2 has the clip for itself, and the curve's rate is that of what moves."""
    blocks = RotationConfig(r1="none", r4="none", inputs="blocks", blocks=BlocksConfig(8))
    clipped = OptimizerConfig("cayley_adam", max_grad_norm=0.01)

    def learner(rate: float, names: list[str]):
        lr = RatesConfig(r1=0.02, scale=0.03, inputs=rate)
        learn = LearnConfig(**{**SETTINGS, "lr": lr, "rotations": names, "optimizer": clipped})
        return learner_of(partial(make_model, torch.float64), learn, QUANT, start=blocks)

    def of_r2(rate: float) -> tuple[float, float]:
        found = learner(rate, ["r2", "inputs"])
        _, norm = found.gradients(0, BATCH)
        return norm, found.rotations.parameters["r2"].grad.norm().item()

    (held, alone), (moved, shared) = of_r2(0.0), of_r2(0.01)
    assert alone == pytest.approx(0.01, rel=1e-4) and shared < alone
    assert 0 < held < moved
    assert learner(0.0, ["inputs", "r2"]).step(0, BATCH)["lr"] == pytest.approx(0.02)
    assert learner(0.0, ["inputs"]).step(0, BATCH)["lr"] == 0


def test_what_would_learn_nothing_is_refused():
    with pytest.raises(InputError, match=r"learn\.lr\.inputs=0 holds the rotations of inputs"):
        LearnConfig(**{**SETTINGS, "lr": RatesConfig(inputs=0)})


def test_a_resumed_run_ends_with_the_same_bits(make_model, learner_from, tmp_path):
    inputs, windows = transforms(make_model()), BATCH.repeat(4, 1)
    rates = RatesConfig(scale=0.03, inputs=0.01, clip=0.03, input_clip=0.02, kv_clip=0.02)
    changes = dict(dtype=torch.float32, lr=rates)
    whole = learner_from(make_model, inputs, **changes)
    curve: list = []
    learn_rotations(whole, windows, 0, lambda step, values: curve.append(values))
    first = learner_from(make_model, inputs, **changes)
    part = [first.step(i, windows[4 * i : 4 * i + 4]) for i in range(2)]
    save_progress(first, tmp_path / "progress.safetensors", part)
    second = learner_from(make_model, inputs, **changes)
    resumed = resume(second, tmp_path / "progress.safetensors")
    learn_rotations(second, windows, 2, lambda step, values: resumed.append(values))
    assert resumed == curve
    for key, transform in whole.result().inputs.items():
        same = second.result().inputs[key]
        assert torch.equal(transform.scale, same.scale)
        assert torch.equal(transform.dual.second, same.dual.second)
    assert second.result().clips == whole.result().clips
    assert min(whole.result().clips.values()) < 1
    assert second.result().kv_clips == whole.result().kv_clips
    assert min(whole.result().kv_clips.values()) < 1
    assert head_of(whole.model).weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scaled_rotations_have_the_gradients_of_autograd(dtype):
    g = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 4, 4, generator=g, dtype=dtype, requires_grad=True)
    log_scale = torch.randn(2, 12, generator=g, dtype=dtype, requires_grad=True)
    made = scaled(first, log_scale)
    back = [torch.randn(x.shape, generator=g, dtype=dtype) for x in made]
    expected = torch.autograd.grad(made, (first, log_scale), back)
    found = scaled_gradients(first.detach(), log_scale.detach(), *back)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
