"""Rotations applied while the network runs: R3 on queries and keys, R4 before down_proj."""

from typing import Protocol

import torch
from torch import nn

from spinlab.rotation.hadamard import hadamard_block, hadamard_factors, hadamard_matrix
from spinlab.rotation.orthogonal import assert_orthogonal


class InputTransform(Protocol):
    """What runs before a linear, with its inverse in the weight: (x·T) (W·T⁻ᵀ)ᵀ = x Wᵀ."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Transform inputs x: (..., in)."""
        ...

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight (out, in) that belongs to transformed inputs, in its own dtype."""
        ...


class OnlineRotation(nn.Module):
    """Turn the last dimension by x ↦ x·(I ⊗ A ⊗ B), A (a, a), B (b, b), width blocks·a·b.

    Two small dense products cost a + b multiplications per entry instead of a·b; a Hadamard
    matrix of any order splits that way, a dense rotation is A = 1. Products are taken in float32
    or wider: the entries of a Hadamard factor, rounded to 16 bits, would all be off one way.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, blocks: int = 1) -> None:
        super().__init__()
        assert_orthogonal("online rotation", left)
        assert_orthogonal("online rotation", right)
        self.left, self.right = left.double().contiguous(), right.double().contiguous()
        self.blocks = blocks
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def width(self) -> int:
        return self.blocks * self.left.shape[0] * self.right.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x: (..., width)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (dtype, x.device)
        if key not in self._cast:
            self._cast[key] = (self.left.to(x.device, dtype), self.right.to(x.device, dtype))
        left, right = self._cast[key]
        wide = x.to(dtype).unflatten(-1, (self.blocks, left.shape[0], right.shape[0]))
        # a row x, read as blocks X of (a, b), becomes Aᵀ X B
        turned = wide @ right if left.shape[0] == 1 else left.mT @ (wide @ right)
        return turned.flatten(-3).to(x.dtype)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W R: for a rotation, weights turn as inputs do."""
        return self(weight)

    def dense(self) -> torch.Tensor:
        """Return the whole matrix I ⊗ A ⊗ B: (width, width), float64."""
        eye = torch.eye(self.blocks, dtype=torch.float64)
        return torch.kron(eye, torch.kron(self.left, self.right))


def hadamard_rotation(n: int, block: int = 0, where: str = "rotation") -> OnlineRotation:
    """Return the exact Hadamard rotation H_n/sqrt(n) in its cheapest two factors.

    H_n = H_core ⊗ Sylvester(2^k), and Sylvester matrices split anywhere, so the cut with the
    smallest a + b gives the same matrix. `block` > 0 asks for equal blocks of that order; widths
    without a Hadamard matrix get blocks of their own accord.
    """
    size = block or hadamard_block(n, where)
    core, power = hadamard_factors(size)
    cuts = [(core * (1 << i), power >> i) for i in range(power.bit_length())]
    a, b = min(cuts, key=lambda cut: (cut[0] + cut[1], cut[0]))
    # with a power-of-two core nothing but Sylvester is involved; otherwise H_a = H_core ⊗ H_2^i
    left, right = hadamard_matrix(a).double() / a**0.5, hadamard_matrix(b).double() / b**0.5
    return OnlineRotation(left, right, n // size)
