"""Code keys or values as bytes: packed levels, then float16 scales, then zero points.

One row of bytes holds one head of one token, so that every cache operation of transformers
(append, crop, reorder, repeat) works on coded rows as it does on floats.
"""

from dataclasses import dataclass

import numpy as np
import torch

from spinlab.formats.integer import (
    SMALLEST_HALF,
    Grid,
    at_least_float32,
    decode,
    encode,
    extremes,
    scale_and_zero,
    settled,
    zero_point,
)
from spinlab.formats.integer_numpy import FewLevels, are_few, few_levels
from spinlab.formats.integer_triton import has_kernel, round_rows
from spinlab.formats.pack import pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class AffineCodec:
    """Code rows of `width` numbers on an affine grid, per token, head and group.

    Levels of up to 4 bits take a nibble, others a byte; a group adds a float16 scale and, on an
    asymmetric grid, one byte of zero point.
    """

    grid: Grid
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

    @property
    def _nibbles(self) -> bool:
        return self.grid.bits <= 4 and self.width % 2 == 0

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) without the bytes in between: (..., width)."""
        if has_kernel(x):
            return round_rows(x, self.grid, self.group_size, self.clip_ratio, half_scale=True)
        levels, scale, zero = self._levels(x)
        return self._decode(levels, scale, zero, x.dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8."""
        return self._pack_few(self._few_levels(x)) if are_few(x) else self._pack(*self._levels(x))

    def encode_and_round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode(x) and what it decodes to, in x's dtype."""
        if are_few(x):
            few = self._few_levels(x)
            return self._pack_few(few), torch.from_numpy(few.decode()).view(x.shape).to(x.dtype)
        levels, scale, zero = self._levels(x)
        return self._pack(levels, scale, zero), self._decode(levels, scale, zero, x.dtype)

    def _pack(self, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        levels = levels.flatten(-2)
        parts = [pack_nibbles(levels) if self._nibbles else levels.to(torch.int16).to(torch.uint8)]
        parts.append(scale.squeeze(-1).to(torch.float16).contiguous().view(torch.uint8))
        if not self.grid.symmetric:
            parts.append(zero.squeeze(-1).to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def _few_levels(self, x: torch.Tensor) -> FewLevels:
        """Return what `_levels` does, in numpy."""
        few = few_levels(x, self.grid, self.group_size, self.clip_ratio, half_scale=True)
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
        return self._decode(grouped, scale, zero, dtype)

    def _levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return levels (..., groups, g) with the scale that float16 stores, and its zero."""
        if are_few(x):
            levels, scale, zero = (torch.from_numpy(t) for t in self._few_levels(x))
            return levels, scale, zero
        grouped, lowest, highest = extremes(at_least_float32(x), self.group_size)
        ends = lowest * self.clip_ratio, highest * self.clip_ratio
        scale, _ = scale_and_zero(*ends, self.grid)
        scale = scale.clamp_(min=SMALLEST_HALF).to(torch.float16).to(grouped.dtype)
        zero = torch.zeros_like(scale)
        if not self.grid.symmetric:
            zero = zero_point(ends[0].clamp(max=0), scale).clamp_(0, self.grid.highest)
        return encode(grouped, scale, zero, self.grid, settled), scale, zero

    def _decode(
        self, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return decode(levels, scale, zero, self.grid).flatten(-2).to(dtype)
