"""Orthogonal matrices: make them, project onto them, measure how orthogonal they are."""

import torch

from spinlab.rotation.hadamard import hadamard_matrix

ORTHOGONAL_TOLERANCE = 1e-6


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw an (n, n) float64 orthogonal matrix from the Haar measure.

    QR of a Gaussian matrix, with the signs of R's diagonal moved into Q (Mezzadri 2007); without
    them the distribution depends on the QR routine.
    """
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.sign(torch.diagonal(r))


def random_signs(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw n independent signs ±1, float64."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def randomized_hadamard(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return diag(random signs)·H/sqrt(n): (n, n), float64 (QuaRot sec. 3)."""
    return random_signs(n, generator)[:, None] * hadamard_matrix(n).double() / n**0.5


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Project (..., n, n) onto the nearest orthogonal matrices, in float64.

    The orthogonal polar factor U Vᵀ of M = U S Vᵀ is nearest in every unitarily invariant norm.
    """
    u, _, v = torch.linalg.svd(matrix.double())
    return u @ v


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Return max|R Rᵀ - I| over (..., n, n), in float64.

    R Rᵀ is what fusing relies on, and drifts further than Rᵀ R under row-wise updates.
    """
    r = matrix.detach().double()
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (r @ r.mT - eye).abs().max().item()


def assert_orthogonal(name: str, matrix: torch.Tensor) -> None:
    """Assert that a rotation about to be used is orthogonal to 1e-6."""
    error = orthogonality_error(matrix)
    assert error <= ORTHOGONAL_TOLERANCE, f"{name} is not orthogonal: max|RRᵀ-I| = {error:.2e}"
