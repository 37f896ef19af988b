"""Rotations applied while the network runs: R3 on queries and keys, R4 before down_proj."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from spinlab.rotation.hadamard import hadamard_block, hadamard_factors, hadamard_matrix
from spinlab.rotation.orthogonal import check_orthogonal

_DENSE = 128  # up to this order one product is faster than two with batches of small factors


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
    or wider: the entries of a Hadamard factor, rounded to 16 bits, would all be off one way. Its
    signs are exact in any dtype, so 16-bit inputs are multiplied by those, and scaled once. The
    result is rounded once by each product: relative errors stay below 2^-8, with no loss of length.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, blocks: int = 1) -> None:
        super().__init__()
        check_orthogonal("online rotation", left)
        check_orthogonal("online rotation", right)
        self.left, self.right = left.double().contiguous(), right.double().contiguous()
        self.blocks = blocks
        entries = [m.abs() for m in (self.left, self.right)]
        self.flat = all(bool((e - e[0, 0]).abs().max() < 1e-12) for e in entries)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self._whole: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, float]] = {}

    @property
    def width(self) -> int:
        return self.blocks * self.left.shape[0] * self.right.shape[0]

    def at(self, layer: int) -> "OnlineRotation":
        """Return the rotation of a layer: one stands for all of them."""
        return self

    def of(self, width: int) -> "OnlineRotation":
        """Return the rotation of inputs of a width: all have that of this one."""
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x: (..., width)."""
        return self.of_weight(x)

    def factors(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as products take them: in 16 bits, the signs of their entries."""
        if (dtype, device) not in self._cast:
            pair = self.left, self.right
            kept = (m.sign() if dtype.itemsize == 2 else m for m in pair)
            left, right = (m.to(device, dtype) for m in kept)
            self._cast[dtype, device] = left, right
        return self._cast[dtype, device]

    def _by_signs(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.factors(x.dtype, x.device)
        scale = (self.left[0, 0] * self.right[0, 0]).abs().item()
        rows = x.reshape(-1, right.shape[0])
        # alpha acts on the product's accumulator, before anything is rounded
        rotated = torch.addmm(x.new_zeros(right.shape[0]), rows, right, beta=0, alpha=scale)
        if left.shape[0] > 1:
            rotated = left.mT @ rotated.view(-1, left.shape[0], right.shape[0])
        return rotated.reshape(x.shape)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W R for W: (out, width), since weights are rotated as inputs are.

        One that only the caller's argument names is gone before the second product: a weight in
        float64 is there twice, not three times.
        """
        if self.flat and weight.dtype.itemsize == 2:
            return self._by_signs(weight)
        shape, dtype = weight.shape, weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        left, right = self.factors(wide, weight.device)
        a, b = left.shape[0], right.shape[0]
        # a row x, read as blocks X of (a, b), becomes Aᵀ X B
        rotated = weight.to(wide).reshape(-1, b) @ right
        del weight
        if a > 1:
            rotated = left.mT @ rotated.view(-1, a, b)
        return rotated.reshape(shape).to(dtype)

    def whole(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, float]:
        """Return the whole matrix as one product takes it, and what the product is scaled by.

        In 16 bits the signs of a Hadamard matrix, as above, else float32. It stays where it is for
        as long as the rotation does, so that a CUDA graph can hold it.
        """
        if (dtype, device) not in self._whole:
            dense, signs = self.dense(), self.flat and dtype.itemsize == 2
            kept = dense.sign().to(device, dtype) if signs else dense.to(device, torch.float32)
            self._whole[dtype, device] = kept, dense.abs().max().item() if signs else 1.0
        return self._whole[dtype, device]

    def dense(self) -> torch.Tensor:
        """Return the whole matrix I ⊗ A ⊗ B: (width, width), float64."""
        eye = torch.eye(self.blocks, dtype=torch.float64)
        return torch.kron(eye, torch.kron(self.left, self.right))


class WidthRotations:
    """Hold an online rotation for each of the widths that inputs of one kind have, ascending."""

    def __init__(self, rotations: Sequence[OnlineRotation]) -> None:
        self.by_width = {rotation.width: rotation for rotation in rotations}

    def of(self, width: int) -> OnlineRotation:
        """Return the rotation of a width."""
        return self.by_width[width]


class LayerRotations:
    """Hold an online rotation of its own for each layer, all with factors of one shape."""

    def __init__(self, layers: Sequence[OnlineRotation]) -> None:
        self.layers = tuple(layers)
        self.blocks, self.width = layers[0].blocks, layers[0].width

    @property
    def left(self) -> torch.Tensor:
        """Return the factors A of all layers: (layers, a, a)."""
        return torch.stack([layer.left for layer in self.layers])

    @property
    def right(self) -> torch.Tensor:
        """Return the factors B of all layers: (layers, b, b)."""
        return torch.stack([layer.right for layer in self.layers])

    def at(self, layer: int) -> OnlineRotation:
        """Return the rotation of a layer."""
        return self.layers[layer]

    def dense(self) -> torch.Tensor:
        """Return the whole matrices: (layers, width, width), float64."""
        return torch.stack([layer.dense() for layer in self.layers])


def dense_rotation(matrix: torch.Tensor) -> OnlineRotation | LayerRotations:
    """Return the online rotation by a matrix (n, n), or those by one for each layer (layers, n, n).

    Raises AssertionError for what is not orthogonal.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    if matrix.dim() == 2:
        return OnlineRotation(one, matrix)
    return LayerRotations([OnlineRotation(one, own) for own in matrix])


def hadamard_rotation(n: int, block: int = 0, where: str = "rotation") -> OnlineRotation:
    """Return the exact Hadamard rotation H_n/sqrt(n) in its cheapest two factors.

    H_n = H_core ⊗ Sylvester(2^k), and Sylvester matrices split anywhere, so the cut with the
    smallest a + b gives the same matrix. `block` > 0 asks for equal blocks of that order; widths
    without a Hadamard matrix get blocks of their own accord.
    """
    size = block or hadamard_block(n, where)
    if size <= _DENSE:
        dense = hadamard_matrix(size).double() / size**0.5
        return OnlineRotation(torch.ones(1, 1, dtype=torch.float64), dense, n // size)
    core, power = hadamard_factors(size)
    cuts = [(core * (1 << i), power >> i) for i in range(power.bit_length())]
    a, b = min(cuts, key=lambda cut: (cut[0] + cut[1], cut[0]))
    # with a power-of-two core nothing but Sylvester is involved; otherwise H_a = H_core ⊗ H_2^i
    left, right = hadamard_matrix(a).double() / a**0.5, hadamard_matrix(b).double() / b**0.5
    return OnlineRotation(left, right, n // size)
