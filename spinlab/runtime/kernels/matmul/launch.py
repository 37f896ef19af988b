"""The outputs of a linear in one launch, for CUDA: the twin of `groups.outputs`.

One after the other, every block costs some eight passes over all outputs: here a program keeps its
tile of them in registers. Integers are exact in both, and their float32 products and sums are the
same ones, in the same order.
"""

from functools import cache

import torch

from spinlab.device import lacks_kernels
from spinlab.formats.quantizer import Encoded
from spinlab.runtime.kernels.launch import launch
from spinlab.runtime.kernels.matmul.groups import Tables

_BM, _BN = 64, 128  # tokens and outputs of a program, of whose two sums a thread holds 64 each
_SMALLEST = 32  # columns of a tensor core's product of bytes


def has_kernel(tables: Tables) -> bool:
    """Tell whether there is a kernel for a weight: one of several blocks, in float32."""
    several = len(tables.sums) > 1 and tables.scale.dtype == torch.float32
    return several and tables.levels.is_cuda and _runs_kernels(tables.levels.device)


@cache
def _runs_kernels(device: torch.device) -> bool:
    return lacks_kernels(device) is None


def outputs(
    inputs: Encoded,
    tables: Tables,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the outputs (tokens, out), as the definition does for a weight that has a kernel."""
    levels, scale, zero = inputs
    assert tables.levels.is_contiguous(), "a weight lies in one piece"
    tokens, width = levels.shape
    out, blocks = len(tables.levels), len(tables.sums)
    found = torch.empty(tokens, out, dtype=dtype, device=levels.device)
    if not tokens:
        return found
    from spinlab.runtime.kernels.matmul.triton import outputs_kernel  # which loads it

    block = width // blocks
    arguments = (
        levels.contiguous(), tables.levels, found, scale.contiguous(), zero.contiguous(),
        tables.scale, tables.sums, tables.sums if tables.zero is None else tables.zero,
        tables.scale if bias is None else bias, tokens, out, blocks, blocks // scale.shape[1],
    )  # fmt: skip
    step = 2 * _SMALLEST if block % (2 * _SMALLEST) == 0 else _SMALLEST
    constants = {
        "BLOCK": block, "UNSIGNED": levels.dtype == torch.uint8, "ZEROS": tables.zero is not None,
        "BIAS": bias is not None, "BM": _BM, "BN": _BN, "BK": step,
    }  # fmt: skip
    grid = (-(-tokens // _BM) * -(-out // _BN),)
    options = {"overlap": False, "num_warps": 4, "enable_fp_fusion": False}
    launch(outputs_kernel, grid, arguments, constants, **options)
    return found
