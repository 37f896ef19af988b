"""cuBLAS's integer product, of a GPU: one block of columns at a time."""

import torch
from torch.nn.functional import pad

_ROWS, _EIGHT = 32, 8  # it takes more than 16 rows, and widths that are multiples of 8


def matmul(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return levels @ weightᵀ in int32, exact. Reads nothing back to the host."""
    if levels.dtype == torch.uint8:  # it takes signed bytes only
        shifted = (levels ^ 128).view(torch.int8)
        return matmul(shifted, weight) + 128 * weight.sum(1, dtype=torch.int32)
    tokens, columns = len(levels), -levels.shape[1] % _EIGHT
    rows = max(_ROWS, tokens + -tokens % _EIGHT)
    levels = pad(levels, (0, columns, 0, rows - tokens))
    out, missing = len(weight), -len(weight) % _EIGHT
    weight = pad(weight, (0, columns, 0, missing)) if columns or missing else weight
    found = torch._int_mm(levels, weight.t())  # pyright: ignore[reportPrivateImportUsage]
    return found[:tokens, :out]
