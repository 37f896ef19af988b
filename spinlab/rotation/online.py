"""Rotations applied while the network runs: R3 on queries and keys, R4 before down_proj."""

import torch
from torch import nn

from spinlab.rotation.hadamard import hadamard_factors, hadamard_matrix
from spinlab.rotation.orthogonal import assert_orthogonal, random_orthogonal


class OnlineRotation(nn.Module):
    """Turn the last dimension by x ↦ x·(A ⊗ B), with A (a, a), B (b, b) and width a·b.

    Two small dense products cost a + b multiplications per entry instead of a·b; a Hadamard
    matrix of any order splits that way, a dense rotation is A = 1. Products are taken in float32
    or wider: the entries of a Hadamard factor, rounded to 16 bits, would all be off one way.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__()
        assert_orthogonal("online rotation", left)
        assert_orthogonal("online rotation", right)
        self.left, self.right = left.double(), right.double()
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def width(self) -> int:
        return self.left.shape[0] * self.right.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x: (..., width)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (dtype, x.device)
        if key not in self._cast:
            self._cast[key] = (self.left.to(x.device, dtype), self.right.to(x.device, dtype))
        left, right = self._cast[key]
        wide = x.to(dtype)
        if left.shape[0] == 1:
            return (wide @ right).to(x.dtype)
        # a row x, read as X (a, b), becomes Aᵀ X B
        turned = left.mT @ (wide.unflatten(-1, (left.shape[0], right.shape[0])) @ right)
        return turned.flatten(-2).to(x.dtype)

    def dense(self) -> torch.Tensor:
        """Return the whole matrix A ⊗ B: (width, width), float64."""
        return torch.kron(self.left, self.right)


def hadamard_rotation(n: int) -> OnlineRotation:
    """Return the exact Hadamard rotation H_n/sqrt(n) in its cheapest two factors.

    H_n = H_core ⊗ Sylvester(2^k), and Sylvester matrices split anywhere, so the cut with the
    smallest a + b gives the same matrix.
    """
    core, power = hadamard_factors(n)
    cuts = [(core * (1 << i), power >> i) for i in range(power.bit_length())]
    a, b = min(cuts, key=lambda cut: (cut[0] + cut[1], cut[0]))
    # with a power-of-two core nothing but Sylvester is involved; otherwise H_a = H_core ⊗ H_2^i
    left, right = hadamard_matrix(a).double() / a**0.5, hadamard_matrix(b).double() / b**0.5
    return OnlineRotation(left, right)


def online_rotation(kind: str, n: int, generator: torch.Generator) -> OnlineRotation | None:
    """Make an online rotation of width n: none (or identity), hadamard (exact), random (dense)."""
    if kind in ("none", "identity"):
        return None
    if kind == "hadamard":
        return hadamard_rotation(n)
    return OnlineRotation(torch.ones(1, 1), random_orthogonal(n, generator))
