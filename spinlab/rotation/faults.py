"""What may be wrong with the numbers of stored rotations: each function says it, or None."""

import torch

from spinlab.rotation.blocks import inverse_error
from spinlab.rotation.orthogonal import ORTHOGONAL_TOLERANCE, orthogonality_error

LARGEST_SCALE = 1e18  # so that squares of scales, and of their inverses, are float32 numbers


def not_finite(tensor: torch.Tensor) -> str | None:
    """Return what is wrong where a number is NaN or infinite."""
    return None if tensor.isfinite().all() else "holds numbers that are not finite"


def not_orthogonal(tensor: torch.Tensor, most: float = ORTHOGONAL_TOLERANCE) -> str | None:
    """Return what is wrong with matrices (..., n, n) further than `most` from orthogonal."""
    error = orthogonality_error(tensor)
    if error <= most:
        return None
    return not_finite(tensor) or (
        f"is not orthogonal: max|RRᵀ-I| = {error:.1e}, more than the {most:.0e} that is allowed"
    )


def not_invertible(tensor: torch.Tensor) -> str | None:
    """Return what is wrong with matrices (..., n, n) that cannot be undone."""
    error = inverse_error(tensor)
    if error <= ORTHOGONAL_TOLERANCE:
        return None
    return not_finite(tensor) or f"has no inverse to speak of: max|TT⁻¹-I| = {error:.1e}"


def no_ratio(tensor: torch.Tensor) -> str | None:
    """Return what is wrong where a number is no clip ratio."""
    wrong = tensor[~((tensor > 0) & (tensor <= 1))]
    return f"has the clip ratio {wrong[0].item():.3g}, not in (0, 1]" if wrong.numel() else None


def no_scale(tensor: torch.Tensor, least: float = 1 / LARGEST_SCALE) -> str | None:
    """Return what is wrong where a number is smaller or larger than scales are."""
    sound = (tensor >= least) & (tensor <= LARGEST_SCALE)
    if sound.all():
        return None
    return f"has the scale {tensor[~sound][0].item():.3g}, not in [{least:.0g}, 1e18]"


def no_permutation(tensor: torch.Tensor) -> str | None:
    """Return what is wrong with indices (n,) that do not name each of n channels once."""
    if torch.equal(tensor.sort().values, torch.arange(len(tensor))):
        return None
    return f"is no permutation of {len(tensor)} channels"
