"""Orthogonal matrices: make them, project onto them, measure how orthogonal they are."""

import torch

from spinlab.errors import ResultError
from spinlab.rotation.hadamard import hadamard_block, hadamard_matrix

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


def blocks_of(block: torch.Tensor, n: int) -> torch.Tensor:
    """Return the (n, n) block-diagonal matrix with equal (b, b) blocks, b dividing n."""
    eye = torch.eye(n // block.shape[0], dtype=block.dtype, device=block.device)
    return torch.kron(eye, block)


def exact_hadamard(n: int, where: str = "rotation") -> torch.Tensor:
    """Return H/sqrt(n): (n, n), float64; block-diagonal where order n cannot be built."""
    size = hadamard_block(n, where)
    return blocks_of(hadamard_matrix(size).double() / size**0.5, n)


def randomized_hadamard(
    n: int, generator: torch.Generator, where: str = "rotation"
) -> torch.Tensor:
    """Return diag(random signs)·H/sqrt(n): (n, n), float64 (QuaRot sec. 3)."""
    return random_signs(n, generator)[:, None] * exact_hadamard(n, where)


def gaussian_projection(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw an (n, n) matrix of independent N(0, 1/n): orthogonal only in expectation."""
    return torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5


def bernoulli_projection(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw an (n, n) matrix of independent ±1/sqrt(n): unit rows, orthogonal in expectation.

    An off-diagonal entry of R Rᵀ is a mean of n random signs. It has standard deviation
    1/sqrt(n), so the largest of the n²/2 of them is near 2·sqrt(ln(n)/n): it falls slowly with n.
    """
    return random_signs(n * n, generator).view(n, n) / n**0.5


def orthogonalize_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Make the rows of (n, n) orthonormal, in order, as Gram-Schmidt would (QR of the transpose).

    QJL does this to its sketch (Zandieh et al. 2024, sec. 4.1).
    """
    q, r = torch.linalg.qr(matrix.double().mT)
    return (q * torch.sign(torch.diagonal(r))).mT.contiguous()


def well_posed_bernoulli(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw Bernoulli projections until one has full rank: small ones are often singular."""
    while True:
        matrix = bernoulli_projection(n, generator)
        if torch.linalg.matrix_rank(matrix) == n:
            return matrix


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Project (..., n, n) onto the nearest orthogonal matrices, in float64.

    The orthogonal polar factor U Vᵀ of M = U S Vᵀ is nearest in every unitarily invariant norm.
    Near the manifold it is found by Newton-Schulz steps, in products alone: an SVD of order 4096
    takes a GPU seconds. Each step takes a deviation of d from MᵀM = I to about ¾ d².
    """
    found = matrix.double()
    eye = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
    for _ in range(6):
        deviation = found.mT @ found - eye
        size = torch.linalg.matrix_norm(deviation).max().item()  # of the Frobenius norm
        if not size < 0.5:
            u, _, v = torch.linalg.svd(found)
            return u @ v
        if size < 1e-13:
            break
        found = found - found @ (deviation / 2)
    return found


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Return max|R Rᵀ - I| over (..., n, n), in float64.

    R Rᵀ is what fusing relies on, and drifts further than Rᵀ R under row-wise updates. Beside R
    nothing but this product is there.
    """
    r = matrix.detach().double()
    product = r @ r.mT
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product.abs_().max().item()


def check_orthogonal(name: str, matrix: torch.Tensor) -> None:
    """Raise ResultError for a rotation (..., n, n) to be used that is not orthogonal to 1e-6."""
    error = orthogonality_error(matrix)
    if not error <= ORTHOGONAL_TOLERANCE:  # nan fails too
        raise ResultError(f"{name} is not orthogonal: max|RRᵀ-I| = {error:.2e}")
