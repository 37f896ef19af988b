"""The CPU's integer product: torch._int_mm, which reaches the processor's int8 instructions."""

import torch

_SEVERAL = 16  # rows up to which they are better taken as the right operand


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels @ weightᵀ in int32.

    The weight goes in as a transposed view of its (out, in) rows; a contiguous (in, out) copy is
    several times slower for few tokens. The library rearranges a right operand of more than one
    row before it multiplies, so of several signed rows and the weight, the rows go there.
    """
    if levels.dtype == torch.int8 and 1 < len(levels) <= _SEVERAL:
        return _product(weight, levels.t()).t()
    return _product(levels, weight.t())


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(left, right)  # pyright: ignore[reportPrivateImportUsage]
