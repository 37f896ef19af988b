"""The specification of the integer product, on any device, in floating point."""

from collections.abc import Callable

import torch

# of (tokens, in) bytes with (out, in) int8, (tokens, out) int32, exact
Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_PRODUCT = 255 * 128  # what two bytes may have
_EXACT = 1 << 24  # float32 holds every integer up to here, in any order of summation


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels @ weightᵀ in int32.

    float32 where no partial sum can leave its exact integers, float64 otherwise. TF32 must be
    off (`spinlab.device.set_arithmetic`).
    """
    if not len(levels):
        return levels.new_zeros(0, len(weight), dtype=torch.int32)
    width = levels.shape[1]
    exact = width * _PRODUCT < _EXACT or width * _largest(levels) * _largest(weight) < _EXACT
    dtype = torch.float32 if exact else torch.float64
    return (levels.to(dtype) @ weight.to(dtype).mT).to(torch.int32)


def _largest(levels: torch.Tensor) -> int:
    return int(levels.int().abs().max())
