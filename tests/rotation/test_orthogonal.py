"""Random and projected orthogonal matrices against moments and scipy."""

import math

import pytest
import scipy.linalg
import torch

from spinlab.rotation.orthogonal import (
    bernoulli_projection,
    exact_hadamard,
    gaussian_projection,
    orthogonality_error,
    orthogonalize_rows,
    polar,
    random_orthogonal,
    randomized_hadamard,
    well_posed_bernoulli,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_orthogonal_has_haar_moments():
    """Under Haar measure E[R_ij²] = 1/n and E[tr R] = 0, E[(tr R)²] = 1; a QR without the sign
    fix has a trace far from 0."""
    g, n = generator(), 8
    draws = torch.stack([random_orthogonal(n, g) for _ in range(4000)])
    traces = draws.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert orthogonality_error(draws) < 1e-13
    assert abs(traces.mean()) < 4 / 4000**0.5
    assert abs(traces.square().mean() - 1) < 0.15
    assert (draws.square().mean(0) - 1 / n).abs().max() < 0.02


def test_same_seed_same_rotation():
    assert torch.equal(random_orthogonal(6, generator(3)), random_orthogonal(6, generator(3)))
    assert not torch.equal(random_orthogonal(6, generator(3)), random_orthogonal(6, generator(4)))


def test_randomized_hadamard_spreads_every_channel_evenly():
    r = randomized_hadamard(36, generator())
    assert orthogonality_error(r) < 1e-14
    assert torch.allclose(r.abs(), torch.full_like(r, 1 / 6))


def test_polar_agrees_with_scipy():
    noisy = random_orthogonal(12, generator()) + 0.1 * torch.randn(
        12, 12, generator=generator(1), dtype=torch.float64
    )
    expected, _ = scipy.linalg.polar(noisy.numpy())
    assert torch.allclose(polar(noisy), torch.from_numpy(expected), atol=1e-12)


def test_polar_works_in_float64_on_float32_input():
    r = polar(random_orthogonal(32, generator()).float())
    assert r.dtype == torch.float64
    assert orthogonality_error(r) < 1e-14


@pytest.mark.parametrize("draw", [bernoulli_projection, gaussian_projection])
def test_random_projections_grow_orthogonal_as_one_over_the_root_of_n(draw):
    """Off the diagonal of R Rᵀ stand means of n products: their spread is 1/sqrt(n)."""
    for n in (64, 256, 1024):
        gram = (lambda r: r @ r.T)(draw(n, generator(n)))
        off = gram[~torch.eye(n, dtype=torch.bool)]
        assert off.std().item() == pytest.approx(n**-0.5, rel=0.05)
        largest = off.abs().max().item()
        assert largest == pytest.approx(2 * (math.log(n) / n) ** 0.5, rel=0.25)


def test_bernoulli_rows_have_unit_length_and_gaussian_rows_only_on_average():
    rows = bernoulli_projection(256, generator()).norm(dim=1)
    assert torch.allclose(rows, torch.ones_like(rows))
    lengths = gaussian_projection(256, generator()).norm(dim=1)
    assert 0.01 < lengths.std() < 0.1


@pytest.mark.parametrize("draw", [well_posed_bernoulli, gaussian_projection])
@pytest.mark.parametrize("n", [2, 3, 16, 100])
def test_orthogonalized_rows_are_gram_schmidts(draw, n):
    matrix = draw(n, generator(n))
    found = orthogonalize_rows(matrix)
    assert orthogonality_error(found) < 1e-10
    for i in range(n):  # each row adds one direction to those before it, on its own side
        inside = matrix[i] @ found[: i + 1].T @ found[: i + 1]
        assert torch.allclose(inside, matrix[i], atol=1e-9)
        assert matrix[i] @ found[i] > 0


def test_a_width_without_a_hadamard_order_is_turned_in_blocks(caplog):
    r = exact_hadamard(4 * 47, "r1")  # has no construction here
    assert orthogonality_error(r) < 1e-14
    assert torch.equal(r, torch.block_diag(*[exact_hadamard(4)] * 47))
    assert "r1: no Hadamard matrix of order 188" in caplog.text
