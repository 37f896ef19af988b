"""What happens to the input of a linear: an online rotation, then a per-token quantizer.

The linears of one group (q, k, v; gate, up) read the very same tensor. They share one InputPath,
which remembers its last result, so that rotating and quantizing happen once per tensor.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from spinlab.errors import InputError
from spinlab.quant.affine import (
    Grid,
    at_least_float32,
    decode,
    encode,
    extremes,
    scale_and_zero,
    settled,
)
from spinlab.quant.few import FewLevels, few_levels
from spinlab.quant.fused import has_kernel, round_rows

T = TypeVar("T")
Transform = Callable[[torch.Tensor], torch.Tensor]


class Encoded(NamedTuple):
    """Hold integer-valued levels (..., C/g, g) with scale and zero (..., C/g, 1)."""

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class TokenQuantizer:
    """Quantize the last dimension dynamically, per token and group (0 = whole token).

    The range is min..max of the group, shrunk by clip_ratio, and always contains 0. A ratio that
    is being learned is a tensor of no dimensions, on the device of what is quantized.
    """

    grid: Grid
    group_size: int = 0
    clip_ratio: float | torch.Tensor = 1.0

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C)."""
        grouped, lowest, highest = extremes(at_least_float32(x), self.group_size)
        ends = lowest, highest
        if isinstance(self.clip_ratio, torch.Tensor) or self.clip_ratio != 1:
            ends = lowest * self.clip_ratio, highest * self.clip_ratio
        scale, zero = scale_and_zero(*ends, self.grid)
        return Encoded(encode(grouped, scale, zero, self.grid, settled), scale, zero)

    def to_bytes(self, x: torch.Tensor) -> Encoded:
        """Return the levels of x: (..., C) on a grid of at most 8 bits, moved to start at 0.

        Levels are uint8, zero points, moved as well, int32.
        """
        levels, scale, zero = self.encode(x)
        if self.grid.lowest:
            levels, zero = levels - self.grid.lowest, zero - self.grid.lowest
        return Encoded(levels.to(torch.uint8), scale, zero.to(torch.int32))

    def to_few_bytes(self, x: torch.Tensor) -> FewLevels:
        """Return what `to_bytes` does for a few numbers in the host's memory, in numpy."""
        levels, scale, zero = few_levels(x, self.grid, self.group_size, float(self.clip_ratio))
        if self.grid.lowest:
            levels, zero = levels - self.grid.lowest, zero - self.grid.lowest
        return FewLevels(levels.astype(np.uint8), scale, zero.astype(np.int32))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """Return the floats (..., C) that encoded levels stand for, in the scale's dtype."""
        return decode(*encoded, self.grid).flatten(-2)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), with a straight-through gradient."""
        return StraightThrough.apply(x, self.round_trip)  # type: ignore[no-any-return]

    def error(self, x: torch.Tensor) -> torch.Tensor:
        """Return Q(x) - x: (..., C), without a gradient."""
        if has_kernel(x):
            return round_rows(x, self.grid, self.group_size, self.clip_ratio, error=True)
        return self.decode(self.encode(x)).sub_(x).to(x.dtype)

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), without a gradient."""
        if has_kernel(x):
            return round_rows(x, self.grid, self.group_size, self.clip_ratio)
        return self.decode(self.encode(x)).to(x.dtype)


def check_group(setting: str, group_size: int, width: int, where: str) -> None:
    """Raise InputError where groups do not tile a dimension."""
    if group_size and width % group_size:
        raise InputError(f"{setting}={group_size} does not divide {width}, the input of {where}")


class StraightThrough(torch.autograd.Function):
    """Apply a rounding function and pass the gradient on unchanged (Bengio et al. 2013).

    As in SpinQuant's published recipe the gradient is not masked where values were clipped and
    does not reach scale and zero point.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]):
        return rounding(x.detach())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None


class Once:
    """Do work for the first of several readers of a tensor and hand the result to the others.

    A tensor is known by what it is, not by its values, and must not have changed. Readers may want
    different work done. Nothing is kept beyond the last reader.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._last: tuple[weakref.ref, int, dict[object, object]] | None = None
        self._uses = 0

    def __call__(self, x: torch.Tensor, work: Callable[[torch.Tensor], T]) -> T:
        """Return work(x), or what it gave to a reader before."""
        if self.readers == 1:
            return work(x)
        # of a method only the function: kept with its owner it would keep that alive
        name = getattr(work, "__func__", work)
        results = self._known(x)
        self._uses += 1
        if name not in results:
            results[name] = work(x)
        self._last = (weakref.ref(x), _version(x), results)
        if self._uses == self.readers:
            self._last = None
        return results[name]  # type: ignore[return-value]

    def _known(self, x: torch.Tensor) -> dict[object, object]:
        """Return what was done for x; start anew for another tensor."""
        if self._last is not None:
            source, version, results = self._last
            if source() is x and version == _version(x):
                return results
        self._uses = 0
        return {}


class InputPath(nn.Module):
    """Rotate and quantize the input that `readers` linears share."""

    def __init__(
        self, rotation: Transform | None, quantizer: TokenQuantizer | None, readers: int = 1
    ) -> None:
        super().__init__()
        self.rotation, self.quantizer = rotation, quantizer
        self.once = Once(readers)

    @property
    def readers(self) -> int:
        return self.once.readers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated input after a round trip through the integer grid: (..., C)."""
        return self.once(x, self._round)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return the rotated input as bytes, for integer kernels."""
        return self.once(x, self._encode)

    def encode_few(self, x: torch.Tensor) -> FewLevels:
        """Return what `encode` does for a few numbers in the host's memory, in numpy."""
        return self.once(x, self._encode_few)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.rotation is None else self.rotation(x)
        return x if self.quantizer is None else self.quantizer.round(x)

    def _encode(self, x: torch.Tensor) -> Encoded:
        assert self.quantizer is not None
        return self.quantizer.to_bytes(x if self.rotation is None else self.rotation(x))

    def _encode_few(self, x: torch.Tensor) -> FewLevels:
        assert self.quantizer is not None
        rotation = self.rotation
        return self.quantizer.to_few_bytes(x if rotation is None else rotation(x))


def _version(x: torch.Tensor) -> int:
    """Count in-place changes; inference tensors cannot change and do not count."""
    return 0 if x.is_inference() else x._version
