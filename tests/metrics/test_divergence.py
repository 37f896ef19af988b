"""Divergence and flips against scipy in float64, and the original against itself."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from spinlab.metrics import divergence
from spinlab.metrics.divergence import Divergence, compare
from spinlab.metrics.perplexity import perplexity
from spinlab.metrics.states import Head, States
from spinlab.model.modules import head_of

CPU = torch.device("cpu")


def oracle(original: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """KL of every row of logits, in float64."""
    p, q = (softmax(logits.double().numpy(), axis=-1) for logits in (original, other))
    return rel_entr(p, q).sum(-1)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (50, 8) and a head (300, 8) of an original, and another network's logits."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 8, generator=generator)
    head = torch.randn(300, 8, generator=generator)
    return states, head, states @ head.mT + torch.randn(50, 300, generator=generator) / 2


@pytest.mark.parametrize("chunk", [2**24, 900, 1])
def test_divergence_is_scipys_however_many_tokens_are_compared_at_once(logits, monkeypatch, chunk):
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    states, head, other = logits
    found, flips = compare(states, Head(head), other, other.log_softmax(-1))
    np.testing.assert_allclose(found, oracle(states @ head.mT, other), rtol=1e-5, atol=1e-6)
    assert torch.equal(flips, (states @ head.mT).argmax(-1) != other.argmax(-1))
    assert 0 < flips.sum() < 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_model_dtype_are_compared_in_float32(logits, dtype):
    states, head, other = (t.to(dtype) for t in logits)
    original, other = (states @ head.mT).float(), other.float()
    found, _ = compare(states, Head(head), other, other.log_softmax(-1))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, oracle(original, other), rtol=1e-5, atol=1e-6)


def test_a_divided_product_is_compared_divided(logits):
    states, head, other = logits
    found, _ = compare(states, Head(head, divisor=3.0), other, other.log_softmax(-1))
    np.testing.assert_allclose(found, oracle(states @ head.mT / 3, other), rtol=1e-5, atol=1e-6)


def test_a_capped_product_is_compared_capped(logits):
    states, head, other = logits
    found, _ = compare(states, Head(head, cap=3.0), other, other.log_softmax(-1))
    capped = torch.from_numpy(3 * np.tanh((states @ head.mT).numpy() / 3))
    np.testing.assert_allclose(found, oracle(capped, other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("family", "change"),
    [("granite", {"logits_scaling": 3.0}), ("gemma2", {"final_logit_softcapping": 2.0})],
)
def test_an_original_that_changes_its_logits_does_not_diverge_from_itself(
    make_family_model, tmp_path, dtype, family, change
):
    model, states = make_family_model(family, **change).to(dtype), States(tmp_path)
    windows = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    with states.keeping(model, "text") as keep:
        kept = perplexity(model, windows, 1, "", keep)
    itself = Divergence(states, "text", windows, CPU)
    assert perplexity(model, windows, 1, "", itself.see) == kept
    assert itself.metrics() == {"kl": 0.0, "kl_p99": 0.0, "flips": 0.0}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_original_does_not_diverge_from_itself(make_model, tmp_path, batch, dtype):
    model, states = make_model(dtype), States(tmp_path)
    windows = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    with states.keeping(model, "text") as keep:
        kept = perplexity(model, windows, batch, "", keep)
    itself = Divergence(states, "text", windows, CPU)
    assert perplexity(model, windows, batch, "", itself.see) == kept
    assert kept == perplexity(model, windows, batch, "")
    assert itself.metrics() == {"kl": 0, "kl_p99": 0, "flips": 0}
    assert not head_of(model)._forward_pre_hooks


def test_metrics_are_those_of_all_tokens_of_all_windows(make_model, tmp_path):
    original, other, states = make_model(torch.float32), make_model(torch.float32), States(tmp_path)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight * 1.3, requires_grad=False)
    windows = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    with states.keeping(original, "text") as keep:
        perplexity(original, windows, 2, "", keep)
    found = Divergence(states, "text", windows, CPU)
    perplexity(other, windows, 2, "", found.see)
    both = [model(windows).logits[:, :-1] for model in (original, other)]
    expected = oracle(*both)
    assert expected.shape == (5, 23)
    flips = (both[0].argmax(-1) != both[1].argmax(-1)).float().mean().item()
    wanted = {"kl": expected.mean(), "kl_p99": np.percentile(expected, 99), "flips": flips}
    assert found.metrics() == pytest.approx(wanted, rel=1e-5)
