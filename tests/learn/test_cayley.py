"""Cayley steps against the exact transform, geoopt and the paper's equations."""

from itertools import pairwise

import geoopt
import pytest
import torch

from spinlab.learn.optim.cayley import CayleySGD, cayley_exact, cayley_fixed_point, skew_generator
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal


def point_and_gradient(n: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return random_orthogonal(n, g), torch.randn(n, n, generator=g, dtype=torch.float64)


def after_one_step(r: torch.Tensor, gradient: torch.Tensor, **settings) -> torch.Tensor:
    p = torch.nn.Parameter(r.clone())
    p.grad = gradient.clone()
    CayleySGD([p], **settings).step()
    return p.detach()


def test_five_iterations_are_the_exact_cayley_transform_under_the_cap():
    r, gradient = point_and_gradient(64)
    w = skew_generator(r, gradient)
    alpha = 1 / w.abs().sum(0).max()
    found = cayley_fixed_point(r, w, alpha)
    exact = cayley_exact(r, w, alpha.item())
    # worst case 2^-5 of the step; for a random generator the 2-norm is far below the 1-norm
    assert (found - exact).norm() < 1e-4 * (exact - r).norm()


def test_the_exact_transform_solves_its_equation_and_is_orthogonal():
    r, gradient = point_and_gradient()
    w = skew_generator(r, gradient)
    y = cayley_exact(r, w, 0.3)
    assert torch.allclose(y, r - 0.15 * w @ (r + y), atol=1e-12)
    assert orthogonality_error(y) < 1e-12


def test_the_generator_is_skew_and_the_riemannian_gradient():
    r, gradient = point_and_gradient()
    w = skew_generator(r, gradient)
    assert torch.equal(w, -w.mT)
    tangent = geoopt.EuclideanStiefel().egrad2rgrad(r, gradient)
    assert torch.allclose(w @ r, tangent, atol=1e-12)


def test_without_the_cap_a_small_step_is_geoopts_euclidean_step_to_first_order():
    r, gradient = point_and_gradient()
    differences = []
    for lr in (1e-3, 1e-4):
        p = geoopt.ManifoldParameter(r.clone(), manifold=geoopt.EuclideanStiefel())
        p.grad = gradient.clone()
        geoopt.optim.RiemannianSGD([p], lr=lr).step()
        found = after_one_step(r, gradient, lr=lr)
        differences.append(((found - p.detach()).norm() / (found - r).norm()).item())
    assert differences[1] < 1e-3
    assert differences[1] < differences[0] / 5  # the relative difference falls with the step


def test_the_step_is_capped_at_the_inverse_one_norm():
    r, gradient = point_and_gradient()
    w = skew_generator(r, gradient)
    cap = (1 / (w.abs().sum(0).max() + 1e-8)).item()
    capped = after_one_step(r, gradient, lr=100.0)
    assert torch.allclose(capped, cayley_fixed_point(r, w, torch.tensor(cap)), atol=1e-12)
    assert not torch.allclose(capped, after_one_step(r, gradient, lr=cap / 2))


def test_stacked_matrices_move_independently_each_with_its_own_cap():
    pairs = [point_and_gradient(seed=s) for s in range(3)]
    pairs[1] = (pairs[1][0], 50 * pairs[1][1])
    together = after_one_step(
        torch.stack([r for r, _ in pairs]), torch.stack([g for _, g in pairs]), lr=0.02
    )
    for found, (r, gradient) in zip(together, pairs, strict=True):
        assert torch.allclose(found, after_one_step(r, gradient, lr=0.02), atol=1e-13)


def test_the_step_descends():
    r, target = point_and_gradient(8)
    p = torch.nn.Parameter(r.clone())
    optimizer = CayleySGD([p], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -(p * target).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = -torch.linalg.svdvals(target).sum().item()  # Procrustes optimum over all of O(n)
    assert losses[-1] < losses[0]
    assert all(b <= a + 1e-9 for a, b in pairwise(losses))
    assert losses[-1] < 0.8 * best


def test_momentum_changes_the_second_step_and_accelerates():
    def run(momentum: float) -> tuple[torch.Tensor, float]:
        r, target = point_and_gradient(8)
        p = torch.nn.Parameter(r.clone())
        optimizer = CayleySGD([p], lr=0.002, momentum=momentum)
        loss = torch.zeros(())
        for _ in range(40):
            optimizer.zero_grad()
            loss = -(p * target).sum()
            loss.backward()
            optimizer.step()
        return p.detach(), loss.item()

    (plain, slow), (heavy, fast) = run(0.0), run(0.9)
    assert not torch.allclose(plain, heavy)
    assert fast < slow
    assert orthogonality_error(heavy) < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_float32_drift_stays_below_the_limit_of_a_learning_run(momentum):
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(random_orthogonal(64, g).float())
    optimizer = CayleySGD([p], lr=1.5, momentum=momentum)
    for _ in range(100):
        p.grad = torch.randn(64, 64, generator=g)
        optimizer.step()
    assert orthogonality_error(p) < 1e-3  # before the final projection in float64


def test_the_exact_optimizer_takes_the_fixed_points_small_steps():
    pairs = [point_and_gradient(seed=s) for s in range(3)]
    r, gradient = (torch.stack(list(x)) for x in zip(*pairs, strict=True))
    for momentum in (0.0, 0.9):
        settings = {"lr": 1e-4, "momentum": momentum}
        exact = after_one_step(r, gradient, **settings, transform=cayley_exact)
        assert torch.allclose(exact, after_one_step(r, gradient, **settings), atol=1e-14)
        assert not torch.allclose(exact, r, atol=1e-6)


def test_the_exact_optimizer_stays_orthogonal_at_any_step():
    r, gradient = point_and_gradient(64)
    settings = {"lr": 100.0, "cap_step": False}
    assert orthogonality_error(after_one_step(r, gradient, **settings)) > 1
    exact = after_one_step(r, gradient, **settings, transform=cayley_exact)
    assert orthogonality_error(exact) < 1e-12


def test_the_exact_optimizer_is_capped_matrix_by_matrix():
    pairs = [point_and_gradient(seed=s) for s in range(3)]
    pairs[1] = (pairs[1][0], 50 * pairs[1][1])
    r, gradient = (torch.stack(list(x)) for x in zip(*pairs, strict=True))
    together = after_one_step(r, gradient, lr=0.02, transform=cayley_exact)
    for found, (point, slope) in zip(together, pairs, strict=True):
        w = skew_generator(point, slope)
        alpha = min(0.02, (1 / (w.abs().sum(0).max() + 1e-8)).item())
        assert torch.allclose(found, cayley_exact(point, w, alpha), atol=1e-13)


def test_rounding_of_the_exact_optimizer_does_not_pile_up_in_float32():
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(random_orthogonal(256, g).float())
    optimizer = CayleySGD([p], lr=1.5, transform=cayley_exact)
    for _ in range(30):
        p.grad = torch.randn(256, 256, generator=g)
        optimizer.step()
    assert orthogonality_error(p) < 1e-6  # 7e-6 when solved for the point, not the displacement
