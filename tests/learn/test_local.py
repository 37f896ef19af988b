"""Terms on single activations inside the loop, against dense activations and autograd."""

import pytest
import torch

from spinlab.config import LearnConfig, ObjectiveConfig, OptimizerConfig, QuantConfig, TensorQuant
from spinlab.learn import recompute_layers
from spinlab.model.modules import linears_of
from spinlab.rotation.fuse import fold_norms

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
OFF = TensorQuant(bits=16)


@pytest.fixture
def learner_for(make_model, learner_of):
    """Return a maker of learners for an objective."""

    def made(objective, **changes):
        settings: dict = dict(steps=4, batch=4, micro_batch=2, sequence_length=16)
        settings |= {"optimizer": OptimizerConfig(max_grad_norm=None)}
        learn = LearnConfig(**settings | changes, objective=objective)
        return learner_of(make_model, learn, QuantConfig(weights=TensorQuant(symmetric=True)))

    return made


def gradients(learner):
    terms, _ = learner.gradients(0, BATCH)
    return terms, {n: p.grad.clone() for n, p in learner.rotations.parameters.items()}


def kurtosis(y):
    z = (y - y.mean(-1, keepdim=True)) / y.var(-1, unbiased=False, keepdim=True).sqrt()
    return (z.pow(4).mean(-1) - 1.8).abs().mean()


def whip(y):
    return (-y.abs()).exp().sum(-1).mean()


TERMS = {"kurtosis": kurtosis, "whip": whip}


def by_autograd(make_model, start, term):
    """Gather what the original's readers of the stream and values are given, then differentiate."""
    model = make_model(torch.float64)
    fold_norms(model)
    found: list[tuple[str, int, torch.Tensor]] = []
    for site, module in linears_of(model):
        if site.name.endswith(("q_proj", "gate_proj")):
            module.register_forward_pre_hook(
                lambda m, args, at=site.layer: found.append(("r1", at, args[0]))
            )
        if site.name.endswith("v_proj"):
            module.register_forward_hook(
                lambda m, args, out, at=site.layer: found.append(("r2", at, out))
            )
    with torch.no_grad():
        model(input_ids=BATCH, use_cache=False)
    r1, r2 = (getattr(start, name).clone().requires_grad_() for name in ("r1", "r2"))
    places = [
        term(x @ r1 if name == "r1" else x.unflatten(-1, (-1, r2.shape[-1])) @ r2[layer])
        for name, layer, x in found
    ]
    loss = torch.stack(places).mean()
    loss.backward()
    return loss.item(), {
        name: 0.5 * (r.grad - r.detach() @ r.grad.mT @ r.detach())
        for name, r in (("r1", r1), ("r2", r2))
    }


@pytest.mark.parametrize("name", TERMS)
def test_local_terms_alone_are_those_of_the_originals_activations(make_model, learner_for, name):
    objective = ObjectiveConfig(cross_entropy=0.0, **{name: 2.0})
    learner = learner_for(objective)
    terms, found = gradients(learner)
    loss, expected = by_autograd(make_model, learner.start, TERMS[name])
    assert terms["loss"] == pytest.approx(2 * loss, rel=1e-9)
    for which, gradient in expected.items():
        assert gradient.norm() > 1e-4
        assert torch.allclose(found[which], 2 * gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rounded", [False, True])
def test_local_terms_add_to_others_and_layers_may_be_recomputed(learner_for, rounded):
    both = ObjectiveConfig(kurtosis=0.5, whip=0.1)
    parts = [both, ObjectiveConfig(), ObjectiveConfig(kurtosis=0.5), ObjectiveConfig(whip=0.1)]
    runs = [gradients(learner_for(o, quantize_weights=rounded)) for o in parts]
    whole, alone = runs[0], runs[1]
    for name, gradient in whole[1].items():
        added = sum(run[1][name] - alone[1][name] for run in runs[2:])
        assert torch.allclose(gradient, alone[1][name] + added, atol=1e-10)
    again = learner_for(both, quantize_weights=rounded)
    recompute_layers(again.model)
    recomputed = gradients(again)
    assert recomputed[0] == pytest.approx(whole[0], rel=1e-12)
    for name, gradient in whole[1].items():
        assert torch.allclose(recomputed[1][name], gradient, atol=1e-12)
