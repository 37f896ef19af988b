"""The specification of the integer product, on any device."""

import torch


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels @ weightᵀ in int32. float64 holds sums of int8 products exactly."""
    return (levels.double() @ weight.double().mT).to(torch.int32)
