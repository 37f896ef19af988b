"""The CPU's integer product: torch._int_mm, which reaches the processor's int8 instructions."""

import torch


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels @ weightᵀ in int32.

    The weight goes in as a transposed view of its (out, in) rows; a contiguous (in, out) copy is
    several times slower for few tokens.
    """
    return torch._int_mm(levels, weight.t())  # pyright: ignore[reportPrivateImportUsage]
