"""The definition of every kernel in torch: any device, any float dtype, nothing fast."""

from spinlab.runtime.kernels.reference.linear import linear, linear16
from spinlab.runtime.kernels.reference.matmul import matmul

__all__ = ["linear", "linear16", "matmul"]
