"""The CPU's integer product: torch._int_mm, which reaches the processor's int8 instructions.

It is not right everywhere. Without VNNI its library adds products of bytes in pairs that saturate
at 16 bits, which weights within ±64 cannot reach; older versions of torch refuse unsigned bytes.
So each way to call it is tried on small operands before the first of the process's products.
"""

import logging
from functools import cache, partial

import torch

from spinlab.runtime.kernels.matmul import reference
from spinlab.runtime.kernels.matmul.reference import Matmul

log = logging.getLogger(__name__)

_SEVERAL = 16  # rows up to which they are better taken as the right operand
_NARROW, _WIDE = 64, 128  # what weights may reach
_TRIED = [(1, 2, 1), (1, 64, 40), (2, 3, 2), (5, 65, 1), (16, 576, 8), (17, 31, 3), (40, 576, 48)]


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels (tokens, in) @ weightᵀ (in, out) in int32, exact for all bytes."""
    return _right_product(_WIDE)(levels, weight)


def matmul_narrow(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels (tokens, in) @ weightᵀ (in, out) in int32, exact for weights within ±64."""
    return _right_product(_NARROW)(levels, weight)


@cache
def _right_product(most: int) -> Matmul:
    """Return the fastest product that this machine does right with weights within ±most."""
    for swap in (True, False):
        for unsigned in (True, False):
            product = partial(_product, swap=swap, unsigned=unsigned)
            if _is_right(product, most):
                return product
    log.warning(
        "torch._int_mm is wrong on this machine for weights up to %d: they are multiplied in "
        "floating point, which is exact and slower",
        most,
    )
    return reference.matmul


def _product(
    levels: torch.Tensor, weight: torch.Tensor, swap: bool, unsigned: bool
) -> torch.Tensor:
    """Multiply; swap: few signed rows may be the right operand, unsigned: left ones may be.

    The weight goes in as a transposed view of its (out, in) rows; a contiguous (in, out) copy is
    several times slower for few tokens. The library rearranges a right operand of more than one
    row before it multiplies, so of several signed rows and the weight, the rows go there.
    """
    if levels.shape[1] == 1:  # the library makes nonsense of one column
        return levels.int() * weight.int().t()
    if not unsigned and levels.dtype == torch.uint8:
        # signed bytes are 128 less; a row of ones finds what that takes from the others
        ones = torch.ones(1, levels.shape[1], dtype=torch.uint8)
        rows = torch.cat((levels ^ 128, ones)).view(torch.int8)
        found = _product(rows, weight, swap, unsigned)
        return found[:-1] + 128 * found[-1]
    left, right = levels, weight
    if swap and levels.dtype == torch.int8 and 1 < len(levels) <= _SEVERAL:
        left, right = right, left
    found = torch._int_mm(left, right.t())  # pyright: ignore[reportPrivateImportUsage]
    return found if left is levels else found.t()


def _is_right(product: Matmul, most: int) -> bool:
    """Try a product on random bytes and on the largest; a way that is refused is not right."""
    generator = torch.Generator().manual_seed(0)
    for tokens, width, out in _TRIED:
        levels = torch.randint(256, (tokens, width), dtype=torch.uint8, generator=generator)
        weight = torch.randint(-most, most, (out, width), dtype=torch.int8, generator=generator)
        levels[-1], weight[-1] = 255, -most
        for operand in (levels, levels.view(torch.int8), levels.clamp(max=127).view(torch.int8)):
            try:
                found = product(operand, weight)
            except RuntimeError:
                return False
            if not torch.equal(found.double(), operand.double() @ weight.double().mT):
                return False
    return True
