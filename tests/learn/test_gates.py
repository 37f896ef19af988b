"""Gate and up in one pass against autograd in float64, and in the network that learns."""

import pytest
import torch
from torch.nn.functional import silu

from spinlab.config import LearnConfig, QuantConfig, RatesConfig, RotationConfig, TensorQuant
from spinlab.learn.spaces import gates
from spinlab.learn.spaces.gates import _Gated, fuse_gates, gated
from spinlab.model.modules import layers_of, map_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # where the interpreter runs kernels


def numbers(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    gate, up, gradient = (3 * torch.randn(shape, generator=g) for _ in range(3))
    factor = 0.5 + torch.rand(shape[-1], generator=g)
    return [t.to(dtype) for t in (gate, up, gradient)], factor


# rows and columns below, at and above those of a program, and none
@pytest.mark.parametrize("shape", [(1, 1), (2, 16, 128), (5, 9, 130), (33, 96), (0, 64)])
@pytest.mark.parametrize("scaled", [False, True])
def test_kernels_give_the_values_and_gradients_of_autograd(shape, scaled):
    (gate, up, gradient), factor = numbers(shape)
    leaves = [t.double().requires_grad_() for t in (gate, up, factor)]
    wanted = silu(leaves[0]) * leaves[1] * (leaves[2] if scaled else 1)
    wanted.backward(gradient.double())
    given = [t.to(DEVICE).requires_grad_() for t in (gate, up, factor)]
    found = _Gated.apply(given[0], given[1], given[2] if scaled else None)
    found.backward(gradient.to(DEVICE))
    assert torch.allclose(found.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    for leaf, ours in zip(leaves[: 2 + scaled], given, strict=False):
        assert torch.allclose(ours.grad.cpu().double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_the_definition_rounds_what_a_folded_scale_would_round():
    """up_proj that holds the factor gives up·factor, rounded; the factor has no rounding above."""
    (gate, up, _), factor = numbers((4, 32), torch.bfloat16)
    factor = factor.bfloat16().float()
    scaled = (up.float() * factor).bfloat16()
    assert torch.equal(gated(gate, up, factor), silu(gate) * scaled)
    assert torch.equal(gated(gate, up), silu(gate) * up)


# the interpreter rounds to float16, and cuts off to bfloat16
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * CUDA)
def test_kernels_round_where_the_definition_does(dtype):
    """Each product to 16 bits, the factor before its own; its gradient is summed in float32."""
    (gate, up, gradient), factor = numbers((64, 300), dtype)
    found = []
    for take, device in ((gated, "cpu"), (_Gated.apply, DEVICE)):
        leaves = [t.detach().to(device).requires_grad_() for t in (gate, up, factor)]
        out = take(*leaves)
        out.backward(gradient.to(device))
        found.append([t.cpu().double() for t in (out.detach(), *(leaf.grad for leaf in leaves))])
    wanted, (*ours, sums) = found[0][:3], found[1]
    for expected, result in zip(wanted, ours, strict=True):  # exponentials may round apart
        assert torch.allclose(result, expected, rtol=2**-7, atol=2**-12)
        assert (result != expected).double().mean() < 0.02
    # autograd sums in 16 bits: the oracle are the rounded terms in float64, two of which may be off
    terms = (gradient.float() * silu(gate).float()).to(dtype).double() * up.double()
    off = (sums - terms.sum(0)).abs()
    assert (off <= 2 * torch.finfo(dtype).eps * terms.abs().amax(0)).all()


def test_kernels_take_what_lies_apart():
    (gate, up, _), factor = numbers((40, 24))
    apart = [t.mT.contiguous().mT.to(DEVICE).requires_grad_() for t in (gate, up)]
    whole = [t.to(DEVICE).requires_grad_() for t in (gate, up)]
    for pair in (apart, whole):
        _Gated.apply(*pair, factor.to(DEVICE)).sum().backward()  # a gradient of stride 0
    for ours, expected in zip(apart, whole, strict=True):
        assert torch.equal(ours.grad, expected.grad)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_networks_are_the_same_and_others_are_left_alone(make_model, activation):
    ids = torch.arange(12)[None]
    plain, fused = (make_model(torch.float64, hidden_act=activation) for _ in range(2))
    inside = fuse_gates(fused, {})
    assert inside == (
        {layer.mlp.up for layer in map_of(fused).layers} if activation == "silu" else set()
    )
    assert torch.equal(plain(ids).logits, fused(ids).logits)


def test_a_step_with_kernels_is_a_step_without(make_model, learner_of, monkeypatch):
    """Loss and gradients of scales, with the kernels where a GPU would run them."""
    shape = {"hidden_size": 32, "intermediate_size": 64}
    learn = LearnConfig(
        steps=1,
        batch=2,
        micro_batch=2,
        sequence_length=16,
        quantize_weights=True,
        rotations=["r2", "inputs"],
        lr=RatesConfig(scale=0.03, clip=0.01, input_clip=0.01),
    )
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    batch = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))

    def gradients():
        learner = learner_of(
            lambda: make_model(torch.float32, **shape),
            learn,
            quant,
            start=RotationConfig(inputs="scales", r1="none", r4="none"),
        )
        terms, _ = learner.gradients(0, batch)
        inputs = learner.rotations.inputs
        return terms["loss"], {name: log.grad.clone() for name, log in inputs.scales.logs.items()}

    loss, wanted = gradients()
    calls = []

    def on_kernels(gate, up, factor=None):
        calls.append(factor)
        given = (None if x is None else x.to(DEVICE) for x in (gate, up, factor))
        return _Gated.apply(*given).to(gate.device)

    monkeypatch.setattr(gates, "gated", on_kernels)
    found, ours = gradients()
    assert len(calls) == len(layers_of(make_model(torch.float32))) and calls[0] is not None
    assert found == pytest.approx(loss, rel=1e-4)
    for name, expected in wanted.items():
        assert (ours[name] - expected).norm() <= 0.02 * expected.norm(), name
