import scipy.linalg
import torch

from spinlab.rotation.orthogonal import (
    orthogonality_error,
    polar,
    random_orthogonal,
    randomized_hadamard,
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
