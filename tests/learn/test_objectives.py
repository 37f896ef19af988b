"""Objectives against full logits and autograd."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from spinlab.config import ObjectiveConfig
from spinlab.learn.objectives import head_loss, kurtosis_loss, whip_loss
from spinlab.learn.objectives.logits import _chunk_terms, _gradient_unit
from spinlab.learn.objectives.logits_triton import full_terms
from spinlab.learn.teacher import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the interpreter runs kernels
VOCAB, WIDTH, TEACHER_WIDTH = 37, 12, 10
BOTH = ObjectiveConfig(cross_entropy=0.7, kl=0.4)
MIXTURES = {
    "cross-entropy": ObjectiveConfig(),
    "kl": ObjectiveConfig(cross_entropy=0.0, kl=1.3),
    "both": BOTH,
    "top 5": ObjectiveConfig(cross_entropy=0.0, kl=2.0, kl_top_k=5),
    "both, top 5": ObjectiveConfig(cross_entropy=0.7, kl=0.4, kl_top_k=5),
    "top 1": ObjectiveConfig(cross_entropy=0.5, kl=1.0, kl_top_k=1),
    "top k above the vocabulary": ObjectiveConfig(cross_entropy=0.5, kl=1.0, kl_top_k=99),
}


def problem(dtype=torch.float64, batch=3, length=9):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden = normal(batch, length, WIDTH).requires_grad_()
    teacher = normal(batch, length, TEACHER_WIDTH), normal(VOCAB, TEACHER_WIDTH)
    labels = torch.randint(0, VOCAB, (batch, length), generator=g)
    return hidden, normal(VOCAB, WIDTH), labels, teacher


def plain(hidden, head, labels, config, teacher, cap=None):
    """The same loss and terms on full logits, by autograd."""
    logits = (hidden[:, :-1] @ head.mT).flatten(0, 1)
    known = (teacher[0][:, :-1] @ teacher[1].mT).flatten(0, 1)
    if cap is not None:
        logits, known = cap * torch.tanh(logits / cap), cap * torch.tanh(known / cap)
    log_p = known.log_softmax(-1)
    cross_entropy = F.cross_entropy(logits, labels[:, 1:].flatten())
    log_q = logits.log_softmax(-1)
    if config.kl_top_k:
        # brute force: sort each token's whole distribution, keep the head, divide by its mass
        kept = log_p.argsort(-1, descending=True)[:, : config.kl_top_k]
        p, q = log_p.exp().gather(-1, kept), log_q.exp().gather(-1, kept)
        log_p, log_q = ((x / x.sum(-1, keepdim=True)).log() for x in (p, q))
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return config.cross_entropy * cross_entropy + config.kl * kl, cross_entropy, kl


def with_gradient(loss, hidden):
    return loss.detach(), *torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("cap", [None, 3.0], ids=["free", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 24, 100])
@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_the_loss_and_its_gradient_are_those_of_full_logits(config, chunk, cap):
    hidden, head, labels, teacher = problem()
    found, terms = head_loss(hidden, head, labels, config, teacher, chunk, cap=cap)
    wanted, cross_entropy, kl = plain(hidden, head, labels, config, teacher, cap)
    loss, gradient = with_gradient(found, hidden)
    wanted, wanted_gradient = with_gradient(wanted, hidden)
    assert abs(loss - wanted) <= 1e-12 * wanted
    assert (gradient - wanted_gradient).norm() <= 1e-10 * wanted_gradient.norm()
    means = {"cross_entropy": cross_entropy, "kl": kl}
    assert set(terms) == {name for name in means if getattr(config, name)}
    for name, term in terms.items():
        assert torch.allclose(term, means[name].detach(), rtol=1e-12, atol=1e-14)
        assert not term.requires_grad


def test_a_network_equal_to_its_teacher_has_no_divergence_and_no_gradient():
    hidden, head, labels, _ = problem()
    config = ObjectiveConfig(cross_entropy=0.0, kl=1.0)
    loss, _ = head_loss(hidden, head, labels, config, (hidden.detach(), head), 7)
    loss, gradient = with_gradient(loss, hidden)
    assert loss.abs() < 1e-14
    assert gradient.abs().max() < 1e-14


def test_weights_of_later_use_scale_the_gradient():
    hidden, head, labels, _ = problem()
    loss, _ = head_loss(hidden, head, labels, ObjectiveConfig(), None, 7)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.allclose(thrice, 3 * once, rtol=1e-14)


def test_the_head_gets_no_gradient_and_the_last_position_none():
    hidden, head, labels, teacher = problem()
    head.requires_grad_()
    teacher[1].requires_grad_()
    loss, _ = head_loss(hidden, head, labels, BOTH, teacher, 7)
    loss.backward()
    assert head.grad is None
    assert teacher[1].grad is None
    assert hidden.grad is not None
    assert torch.count_nonzero(hidden.grad[:, -1]) == 0


def test_without_gradients_the_loss_is_the_same():
    hidden, head, labels, teacher = problem()
    with_grad, _ = head_loss(hidden, head, labels, BOTH, teacher, 7)
    without, _ = head_loss(hidden.detach(), head, labels, BOTH, teacher, 7)
    assert torch.equal(with_grad.detach(), without)
    assert not without.requires_grad


def test_nothing_of_the_vocabularys_size_is_kept():
    hidden, head, labels, teacher = problem()
    loss, _ = head_loss(hidden, head, labels, BOTH, teacher, 7)
    assert loss.grad_fn is not None
    assert loss.grad_fn.saved_tensors == ()
    assert loss.grad_fn.kept.shape == (3 * 8, WIDTH)


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_bfloat16_is_as_close_to_float64_as_autograd_in_bfloat16(config):
    exact = problem()
    hidden, head, labels, teacher = problem(torch.bfloat16)
    found, _ = head_loss(hidden, head, labels, config, teacher, 7)
    assert found.dtype == torch.float32
    logits = [x.detach()[:, :-1] @ y.mT for x, y in ((hidden, head), teacher)]
    loss, gradient = with_gradient(found, hidden)
    # the oracle: the same rounded inputs, in float64
    wide = hidden.detach().double().requires_grad_()
    pair = teacher[0].double(), teacher[1].double()
    wanted, wanted_gradient = with_gradient(
        plain(wide, head.double(), labels, config, pair)[0], wide
    )
    # one rounding of logits near max|logits|, and two of gradients, with 8 bits each
    step = max(x.abs().max().item() for x in logits) * 2**-8
    assert abs(loss - wanted) < step
    assert (gradient - wanted_gradient).norm() < (step + 2**-7) * wanted_gradient.norm()
    assert exact[0].shape == gradient.shape


def test_kurtosis_is_scipys_and_its_loss_vanishes_on_a_uniform_distribution():
    y = torch.randn(5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kurtosis = scipy.stats.kurtosis(y.numpy(), axis=-1, fisher=False)
    assert np.isclose(kurtosis_loss(y).item(), np.abs(kurtosis - 1.8).mean(), rtol=1e-12)
    uniform = torch.linspace(-3, 5, 100_001, dtype=torch.float64).expand(2, -1)
    assert kurtosis_loss(uniform) < 1e-8


def test_kurtosis_ignores_scale_and_survives_tokens_of_zeros():
    y = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(kurtosis_loss(1e-6 * y), kurtosis_loss(1e4 * y), rtol=1e-4)
    y[1] = 0
    y.requires_grad_()
    kurtosis_loss(y).backward()
    assert y.grad is not None
    assert y.grad.isfinite().all()


def test_whip_is_its_formula_and_half_the_width_for_normal_activations():
    y = torch.randn(400, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert np.isclose(whip_loss(y), np.exp(-np.abs(y.numpy())).sum(-1).mean(), rtol=1e-12)
    # E exp(-|x|) = 2 e^½ Φ(-1) for a standard normal x
    assert np.isclose(whip_loss(y) / 256, 2 * np.exp(0.5) * scipy.stats.norm.cdf(-1), rtol=1e-2)


@pytest.mark.parametrize("loss", [kurtosis_loss, whip_loss])
def test_terms_on_activations_differentiate(loss):
    y = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.autograd.gradcheck(loss, y.requires_grad_())
    assert loss(y.bfloat16()).dtype == torch.float32


def test_both_terms_on_activations_prefer_the_rotation_that_spreads_an_outlier():
    y = 0.1 * torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    y[:, 5] += 8
    q, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))
    assert kurtosis_loss(y @ q) < kurtosis_loss(y) / 5
    assert whip_loss(y @ q) < whip_loss(y)


def test_the_relative_error_is_a_ratio_of_energies():
    original = torch.tensor([[3.0, 4.0]])
    assert relative_error(original + torch.tensor([[0.3, 0.4]]), original).item() == pytest.approx(
        0.01
    )
    assert relative_error(original.bfloat16(), original) == 0


@pytest.mark.parametrize("vocabulary", [1, 37, 4096, 5001])  # below, at and above a program's reach
@pytest.mark.parametrize("kind", ["cross-entropy", "kl", "both"])
def test_a_kernel_gives_the_terms_and_gradients_of_the_definition(kind, vocabulary):
    """In float32 against float64, logits far from 0 and far apart among them."""
    config, g = MIXTURES[kind], torch.Generator().manual_seed(5)
    logits, original = (20 * torch.randn(6, vocabulary, generator=g) - 50 for _ in range(2))
    logits[0, 0], original[1, -1] = 300.0, 250.0
    original[2] = logits[2]
    labels = torch.randint(vocabulary, (6, 1), generator=g)
    known = original if config.kl else None
    wanted = _chunk_terms(
        logits.double(), labels, None if known is None else known.double(), config
    )
    share = config.kl / _gradient_unit(config)
    given = [None if t is None else t.to(DEVICE) for t in (logits.clone(), labels, known)]
    terms, gradient = (found.cpu() for found in full_terms(*given, share))
    weights = torch.tensor([config.cross_entropy > 0, config.kl > 0])
    assert torch.allclose(terms.double() * weights, wanted[0] * weights, rtol=2e-6, atol=2e-4)
    assert torch.allclose(gradient.double(), wanted[1], atol=2e-5)
    if kind == "kl":
        assert not gradient[2].any()  # it is equal to its teacher


def test_a_kernel_takes_logits_that_lie_apart_and_none():
    logits, original = (
        torch.randn(30, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )
    labels = torch.tensor([[4], [29], [0], [7]]).to(DEVICE)
    apart = full_terms(logits.mT.to(DEVICE), labels, original.mT.to(DEVICE), 0.5)
    whole = [t.mT.contiguous().to(DEVICE) for t in (logits, original)]
    for ours, expected in zip(apart, full_terms(whole[0], labels, whole[1], 0.5), strict=True):
        assert torch.equal(ours, expected)
    terms, gradient = full_terms(whole[0][:0], labels[:0], whole[1][:0], 0.5)
    assert not terms.any() and gradient.shape == (0, 30)


def test_a_kernel_leaves_gradients_in_the_dtype_of_the_logits():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[4], [49], [0]])
    _, wanted = _chunk_terms(logits.double(), labels, None, ObjectiveConfig())
    gradient = full_terms(logits.to(DEVICE), labels.to(DEVICE), None, 0.0)[1].cpu()
    assert gradient.dtype == torch.bfloat16
    assert torch.allclose(gradient.double(), wanted, rtol=2**-7, atol=1e-7)  # at most cut off


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is a GPU's")
@pytest.mark.parametrize("config", [MIXTURES[kind] for kind in ("cross-entropy", "kl", "both")])
def test_a_gpu_gives_the_loss_of_the_definition_in_float64(config):
    problems = [problem(dtype) for dtype in (torch.float64, torch.bfloat16)]
    found = []
    for hidden, head, labels, teacher in problems:
        states = hidden.detach().cuda().requires_grad_()
        known = teacher[0].cuda(), teacher[1].cuda()
        loss, _ = head_loss(states, head.cuda(), labels.cuda(), config, known, 7)
        found.append([t.double().cpu() for t in with_gradient(loss, states)])
    (wanted, of_wanted), (loss, of_loss) = found
    assert loss == pytest.approx(wanted.item(), rel=0.02)
    assert (of_loss - of_wanted).norm() <= 0.03 * of_wanted.norm()
