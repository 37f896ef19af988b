"""Integer matrix products. A back end is a function with the signature of `reference.matmul`'s.

matmul(levels, weight) -> accumulators
levels  (tokens, in)  unsigned 0..255 or signed -128..127, uint8 or int8
weight  (out, in)     int8
result  (tokens, out) int32, exact
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from spinlab.formats import Format
from spinlab.runtime.kernels.matmul import cpu, cublas, groups, launch, reference
from spinlab.runtime.kernels.matmul.reference import Matmul

KERNELS: Mapping[str, Matmul] = {
    "torch": reference.matmul,
    "cublas": cublas.matmul,
    "cpu": cpu.matmul,
}


def kernel_for(backend: str, format: Format, device: torch.device) -> Matmul:
    """Return a back end's product for weights of a format, whose levels are moved into int8.

    All give the same integers. On a GPU torch's is cuBLAS's: the one in floats reads the largest
    level back to the host before each product.
    """
    if backend == "torch" and device.type == "cuda":
        return KERNELS["cublas"]
    return cpu.matmul_narrow if backend == "cpu" and format.bits <= 6 else KERNELS[backend]


def outputs_for(matmul: Matmul, tables: groups.Tables) -> Callable[..., torch.Tensor]:
    """Return `groups.outputs` by a product, or its twin for those that cuBLAS would multiply."""
    if matmul is cublas.matmul and launch.has_kernel(tables):
        return launch.outputs
    return partial(groups.outputs, matmul)
