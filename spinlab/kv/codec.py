"""Code keys or values as bytes: packed levels, then float16 scales, then zero points.

One row of bytes holds one head of one token, so that every cache operation of transformers
(append, crop, reorder, repeat) works on coded rows as it does on floats.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.integer_numpy import FewLevels
from spinlab.formats.pack import pack_nibbles, unpack_nibbles
from spinlab.formats.quantizer import Encoded, TokenQuantizer


@dataclass(frozen=True)
class AffineCodec:
    """Code rows of `width` numbers on an affine grid, per token, head and group.

    Levels of up to 4 bits take a nibble, others a byte; a group adds a float16 scale and, on an
    asymmetric grid, one byte of zero point.
    """

    grid: IntegerFormat
    width: int
    group_size: int = 0
    clip_ratio: float = 1.0

    @property
    def groups(self) -> int:
        return self.width // (self.group_size or self.width)

    @property
    def row_bytes(self) -> int:
        levels = self.width // 2 if self._nibbles else self.width
        return levels + self.groups * (2 if self.grid.symmetric else 3)

    @property
    def bits(self) -> float:
        """Return the stored bits per number, scales and zero points counted."""
        return 8 * self.row_bytes / self.width

    @cached_property
    def _quantizer(self) -> TokenQuantizer:
        return TokenQuantizer(replace(self.grid, half_scale=True), self.group_size, self.clip_ratio)

    @property
    def _nibbles(self) -> bool:
        return self.grid.bits <= 4 and self.width % 2 == 0

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) without the bytes in between: (..., width)."""
        return self._quantizer.round_trip(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8."""
        if self._quantizer.takes_few(x):
            return self._pack_few(self._few_levels(x))
        return self._pack(*self._quantizer.encode(x))

    def encode_and_round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode(x) and what it decodes to, in x's dtype."""
        if self._quantizer.takes_few(x):
            few = self._few_levels(x)
            return self._pack_few(few), torch.from_numpy(few.decode()).view(x.shape).to(x.dtype)
        encoded = self._quantizer.encode(x)
        return self._pack(*encoded), self._quantizer.decode(encoded).to(x.dtype)

    def _pack(self, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        levels = levels.flatten(-2)
        parts = [pack_nibbles(levels) if self._nibbles else levels.to(torch.int16).to(torch.uint8)]
        parts.append(scale.squeeze(-1).to(torch.float16).contiguous().view(torch.uint8))
        if not self.grid.symmetric:
            parts.append(zero.squeeze(-1).to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def _few_levels(self, x: torch.Tensor) -> FewLevels:
        """Return levels (..., groups, g) with scale and zero (..., groups, 1)."""
        few = self._quantizer.few(x)
        shape = (*few.levels.shape[:-1], 1)
        return FewLevels(few.levels, few.scale.reshape(shape), few.zero.reshape(shape))

    def _pack_few(self, few: FewLevels) -> torch.Tensor:
        """Return what `_pack` does, in numpy."""
        levels = few.levels.reshape(*few.levels.shape[:-2], -1).astype(np.int16).astype(np.uint8)
        if self._nibbles:
            half = self.width // 2
            levels = levels[..., :half] & 0xF | levels[..., half:] << 4
        parts = [levels, few.scale[..., 0].astype(np.float16).view(np.uint8)]
        if not self.grid.symmetric:
            parts.append(few.zero[..., 0].astype(np.uint8))
        return torch.from_numpy(np.concatenate(parts, axis=-1))

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., width) behind coded rows."""
        levels_bytes = self.width // 2 if self._nibbles else self.width
        sizes = [levels_bytes, 2 * self.groups, 0 if self.grid.symmetric else self.groups]
        packed, scale_bytes, zero = rows.split(sizes, dim=-1)
        if self._nibbles:
            levels = unpack_nibbles(packed, self.grid.symmetric)
        else:
            levels = packed.view(torch.int8) if self.grid.symmetric else packed
        wide = torch.promote_types(dtype, torch.float32)
        grouped = levels.to(wide).unflatten(-1, (self.groups, -1))
        # contiguous() would leave odd strides to dimensions of size 1
        scale_bytes = scale_bytes.clone(memory_format=torch.contiguous_format)
        scale = scale_bytes.view(torch.float16).to(wide)[..., None]
        zero = zero.to(wide)[..., None] if not self.grid.symmetric else torch.zeros_like(scale)
        return self._quantizer.decode(Encoded(grouped, scale, zero)).to(dtype)
