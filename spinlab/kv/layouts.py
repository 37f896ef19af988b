"""The layouts that kernels know: nibbles on a grid, or nibbles that name levels."""

from dataclasses import dataclass
from functools import cached_property

import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.integer import at_least_float32
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.base import OwnTensor, PackedLayout, half_scaled, in_half

# Of 1, to which numbers are rounded first. A Hadamard matrix makes exact zeros of few channels, on
# the end of two cells, where float noise would choose between them (see `spinlab.formats.integer`).
_PARTS = 2.0**16
_TINY = 1e-30  # a head of zeros has no direction


@dataclass(frozen=True)
class GridLayout(PackedLayout):
    """Nibbles are levels of a grid of at most 4 bits, less the lowest.

    The range is shrunk by clip_ratio, as everywhere.
    """

    grid: IntegerFormat
    width: int
    clip_ratio: float = 1.0

    @property
    def has_zero(self) -> bool:
        return not self.grid.symmetric

    @property
    def middle(self) -> int:
        """Return the nibble of the number 0 on a symmetric grid."""
        return -self.grid.lowest

    @cached_property
    def quantizer(self) -> TokenQuantizer:
        """The definition of what kernels write."""
        return half_scaled(self.grid, clip_ratio=self.clip_ratio)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        levels, scale, zero = (part.flatten(-2) for part in self.quantizer.encode(x))
        nibbles = (levels - self.grid.lowest).to(torch.uint8)
        scale, zero = scale.squeeze(-1).to(torch.float16), zero.squeeze(-1).to(torch.uint8)
        return nibbles, scale, zero if self.has_zero else None

    def decode(
        self, nibbles: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        middle = self.middle if zero is None else zero[..., None]
        return (nibbles.to(scale.dtype) - middle).mul_(scale[..., None])


@dataclass(frozen=True, eq=False)
class LevelsLayout(PackedLayout):
    """Nibbles (bytes from 5 bits on) name levels of a head's direction; the scale is its length.

    levels: (n,) rising, float16, as products of 16 bits take them. length: how levels c of a head y
    are scaled (`spinlab.config.kv.LENGTHS`).
    """

    width: int
    levels: OwnTensor
    length: str

    @cached_property
    def between(self) -> OwnTensor:
        """Where one level ends and the next begins: (n - 1,)."""
        levels = self.levels.first
        return OwnTensor((levels[1:] + levels[:-1]) / 2)

    @property
    def has_zero(self) -> bool:
        return False

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        y = at_least_float32(x)
        norm = y.norm(dim=-1, keepdim=True)
        unit = (y / norm.clamp(min=_TINY) * _PARTS).round_().mul_(1 / _PARTS)
        places = torch.bucketize(unit.contiguous(), self.between.like(y))
        length = self._length(y, norm, self.levels.like(y)[places]).squeeze(-1)
        return places.to(torch.uint8), in_half(length), None

    def decode(
        self, nibbles: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        return self.levels.like(scale)[nibbles.long()] * scale[..., None]

    def _length(self, y: torch.Tensor, norm: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return what levels c (..., width) are scaled by: (..., 1)."""
        if self.length == "plain":
            return norm
        square, product = (part.sum(-1, keepdim=True) for part in (c * c, c * y))
        if self.length == "norm":
            return norm / square.sqrt()
        if self.length == "least_squares":
            return product / square
        return norm * (norm / product.clamp(min=_TINY))
