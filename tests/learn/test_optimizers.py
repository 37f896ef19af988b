"""Every optimizer solves Procrustes, stays on the manifold and resumes."""

import geoopt
import pytest
import scipy.linalg
import torch

from spinlab.config import LearnConfig, OptimizerConfig, RatesConfig
from spinlab.learn.optim import OPTIMIZERS, make_optimizer, on_manifold, tangent
from spinlab.learn.optim.cayley import cayley_exact, skew_generator
from spinlab.learn.optim.qr import latent_gradient, orthogonal_factor
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal

# step sizes differ in meaning: see make_optimizer
RATES = {
    "cayley_sgd": 0.15,
    "cayley_exact": 0.3,
    "cayley_adam": 0.03,
    "riemannian_sgd": 0.3,
    "riemannian_adam": 0.3,
    "qr_sgd": 0.15,
    "qr_adam": 0.03,
}
WITH_MOMENTUM = ("cayley_sgd", "cayley_exact", "riemannian_sgd", "qr_sgd")
CASES = [(name, 0.0) for name in OPTIMIZERS] + [(name, 0.8) for name in WITH_MOMENTUM]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projected(point, gradient):
    return tangent(point, gradient @ point.mT)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rotations(count: int, n: int = 8, seed: int = 0) -> torch.Tensor:
    g = generator(seed)
    return torch.stack([random_orthogonal(n, g) for _ in range(count)])


def procrustes(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plant A, B, the R that minimizes |A R - B|², and a start a moderate rotation away."""
    a = normal(count, 64, 8)
    b = a @ rotations(count) + 0.1 * normal(count, 64, 8, seed=1)
    pairs = zip(a.numpy(), b.numpy(), strict=True)
    best = [torch.from_numpy(scipy.linalg.orthogonal_procrustes(x, y)[0]) for x, y in pairs]
    skew = 0.3 * normal(count, 8, 8, seed=2)
    return a, b, torch.stack(best), torch.matrix_exp(skew - skew.mT) @ torch.stack(best)


def optimizer_of(p: torch.Tensor, name: str, momentum: float = 0.0) -> torch.optim.Optimizer:
    learn = LearnConfig(lr=RatesConfig(RATES[name]), optimizer=OptimizerConfig(name, momentum))
    lr = learn.lr.r1 * (1 - momentum)
    return make_optimizer([{"params": [p], "lr": lr, "base_lr": lr, "name": "r1"}], learn)


def solve(name: str, momentum: float, a, b, start, steps: int = 300) -> torch.Tensor:
    p = on_manifold(start.clone())
    optimizer = optimizer_of(p, name, momentum)
    (group,) = optimizer.param_groups
    for step in range(steps):
        group["lr"] = group["base_lr"] * (1 - step / steps)
        optimizer.zero_grad()
        ((a @ p - b).square().sum() / 64).backward()
        assert p.grad is not None
        p.grad = projected(p.detach(), p.grad)
        optimizer.step()
    return p.detach().as_subclass(torch.Tensor)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("name", "momentum"), CASES)
def test_every_optimizer_solves_procrustes_and_stays_orthogonal(name, momentum, count):
    a, b, best, start = procrustes(count)
    if count == 1:
        a, b, best, start = a[0], b[0], best[0], start[0]
    found = solve(name, momentum, a, b, start)
    # five iterations leave what the loop projects away every project_every steps
    drift = 1e-4 if name in ("cayley_sgd", "cayley_adam") else 1e-13
    assert orthogonality_error(found) < drift
    assert (found - best).norm() < max(1e-5, 10 * drift)
    assert torch.equal(torch.linalg.det(found) > 0, torch.linalg.det(start) > 0)


@pytest.mark.parametrize(("name", "momentum"), CASES)
def test_stacked_matrices_move_as_each_would_alone(name, momentum):
    a, b, _, start = procrustes(3)
    together = solve(name, momentum, a, b, start, steps=5)
    for index in range(3):
        alone = solve(name, momentum, a[index], b[index], start[index], steps=5)
        assert torch.allclose(together[index], alone, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_projecting_the_gradient_first_changes_nothing(name):
    found = []
    for project in (False, True):
        p = on_manifold(rotations(2))
        optimizer = optimizer_of(p, name)
        for step in range(3):
            p.grad = 0.01 * normal(2, 8, 8, seed=step)  # short: five iterations suffice
            if project:
                p.grad = projected(p.detach(), p.grad)
            optimizer.step()
        found.append(p.detach())
    assert torch.allclose(*found, atol=1e-12)


def test_the_tangent_projection_is_geoopts():
    r, gradient = rotations(2), normal(2, 8, 8)
    wanted = geoopt.EuclideanStiefel().egrad2rgrad(r, gradient)
    assert torch.allclose(projected(r, gradient), wanted, atol=1e-13)


def saved(state: dict) -> dict:
    """Send state through tensors, as the loop's checkpoints do."""
    tensors = {k: (isinstance(v, torch.Tensor), torch.as_tensor(v)) for k, v in state.items()}
    return {k: v.clone() if was_tensor else v.item() for k, (was_tensor, v) in tensors.items()}


@pytest.mark.parametrize(("name", "momentum"), CASES)
def test_a_resumed_run_gives_the_same_bits(name, momentum):
    gradients = normal(6, 2, 8, 8).float()
    whole = on_manifold(rotations(2).float())
    optimizer = optimizer_of(whole, name, momentum)
    resumed = whole
    for step, gradient in enumerate(gradients):
        if step == 3:
            resumed = on_manifold(whole.detach().clone())
            other = optimizer_of(resumed, name, momentum)
            other.state[resumed].update(saved(optimizer.state[whole]))
        whole.grad = projected(whole.detach(), gradient)
        optimizer.step()
        if step >= 3:
            resumed.grad = projected(resumed.detach(), gradient)
            other.step()
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, rotations(2).float())


def test_momentum_changes_the_second_step_of_those_that_have_it():
    for name in WITH_MOMENTUM:
        a, b, _, start = procrustes(1)
        plain, heavy = (solve(name, m, a, b, start, steps=2) for m in (0.0, 0.8))
        assert not torch.allclose(plain, heavy)


@pytest.mark.parametrize("shape", [(7, 7), (3, 5, 5)])
def test_the_qr_gradient_is_autograds_and_that_of_finite_differences(shape):
    latent, weights = normal(*shape), normal(*shape, seed=1)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (weights * orthogonal_factor(z)).sin().sum()

    z = latent.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(z), z)
    r = orthogonal_factor(latent)
    found = latent_gradient(r, latent, weights * (weights * r).cos())
    assert (found - by_autograd).norm() < 1e-10 * by_autograd.norm()
    direction, step = normal(*shape, seed=2), 1e-6
    slope = (loss(latent + step * direction) - loss(latent - step * direction)) / (2 * step)
    assert abs((found * direction).sum() - slope) < 1e-6 * slope.abs()


def test_the_qr_gradient_of_a_float32_latent_is_that_of_float64():
    latent, gradient = rotations(1, 256)[0] + 0.02 * normal(256, 256), normal(256, 256, seed=1)
    wanted = latent_gradient(orthogonal_factor(latent), latent, gradient)
    short = latent.float()
    found = latent_gradient(orthogonal_factor(short), short, gradient.float())
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_orthogonal_factor_of_an_orthogonal_matrix_is_itself():
    r = rotations(2)
    r[1, 0] *= -torch.linalg.det(r).prod().sign()  # one of each determinant
    assert torch.allclose(orthogonal_factor(r), r, atol=1e-13)
    latent = normal(5, 6, 6)
    q = orthogonal_factor(latent)
    upper = q.mT @ latent
    assert orthogonality_error(q) < 1e-13
    assert upper.tril(-1).abs().max() < 1e-13
    assert upper.diagonal(dim1=-2, dim2=-1).min() > 0


def test_the_first_small_qr_step_turns_twice_as_far_as_riemannian_sgd():
    r, gradient = rotations(1), 1e-5 * normal(1, 8, 8)
    moves = []
    for name in ("qr_sgd", "riemannian_sgd"):
        p = on_manifold(r.clone())
        learn = LearnConfig(optimizer=OptimizerConfig(name), lr=RatesConfig(1.0))
        p.grad = gradient.clone()
        make_optimizer([{"params": [p]}], learn).step()
        moves.append(p.detach() - r)
    assert (moves[0] - 2 * moves[1]).norm() < 1e-4 * moves[0].norm()


def test_a_step_of_riemannian_adam_is_as_long_as_its_rate():
    p, lr = on_manifold(rotations(2)), 1e-4
    p.grad = 50 * normal(2, 8, 8)
    learn = LearnConfig(optimizer=OptimizerConfig("riemannian_adam"), lr=RatesConfig(lr))
    make_optimizer([{"params": [p]}], learn).step()
    moved = (p.detach() - rotations(2)).flatten(1).norm(dim=1)
    assert torch.allclose(moved, torch.full_like(moved, lr), rtol=1e-3)


def test_the_exact_step_agrees_with_the_exponential_to_third_order():
    (r,), (gradient,) = rotations(1), normal(1, 8, 8)
    w = skew_generator(r, gradient)
    errors = []
    for alpha in (0.02, 0.01):
        along = torch.from_numpy(scipy.linalg.expm(-alpha * w.numpy())) @ r
        errors.append((cayley_exact(r, w, alpha) - along).norm().item())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.02)
