"""Code rows on an affine grid: packed levels, then float16 scales, then zero points."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.formats.gradient import round_by_range
from spinlab.formats.integer_numpy import FewLevels
from spinlab.formats.pack import pack_few_levels, packed_bytes
from spinlab.formats.quantizer import Encoded, TokenQuantizer, check_group
from spinlab.kv.base import (
    RowCodec,
    from_half_bytes,
    half_bytes,
    half_scaled,
)
from spinlab.kv.layouts import GridLayout


@dataclass(frozen=True)
class AffineCodec(RowCodec):
    """Code rows of `width` numbers on an affine grid, per token, head and group.

    A level takes the grid's bits; a group adds a float16 scale and, on an asymmetric grid, one
    byte of zero point.
    """

    reads = ("symmetric", "group_size", "clip_ratio")
    grid: IntegerFormat
    width: int
    group_size: int = 0
    clip_ratio: float = 1.0

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "AffineCodec":
        """Make the codec of a setting. Raises InputError for bits and groups that do not fit."""
        check_group(f"{name}.group_size", settings.group_size, width, "one attention head")
        return replace(cls.ungrouped(name, settings, width), group_size=settings.group_size)

    @classmethod
    def ungrouped(cls, name: str, settings: CodecConfig, width: int) -> "AffineCodec":
        """Make the codec of a setting with one group. Raises InputError for other bits."""
        if not 2 <= settings.bits <= 8:
            raise InputError(
                f"{name}.bits={settings.bits}: an affine grid codes 2 to 8 bits; 16 switches it off"
            )
        grid = IntegerFormat(settings.bits, settings.symmetric)
        return cls(grid, width, clip_ratio=settings.clip_ratio)

    @property
    def groups(self) -> int:
        return self.width // (self.group_size or self.width)

    @property
    def row_bytes(self) -> int:
        return sum(self._sizes)

    @property
    def packed(self) -> GridLayout | None:
        """Kernels take one group of at most 4 bits per head, whose bytes they read in pairs."""
        if not self.grid.is_int4 or self.groups != 1 or self.width % 4:
            return None
        return GridLayout(self.grid, self.width, self.clip_ratio)

    @cached_property
    def quantizer(self) -> TokenQuantizer:
        """The definition of what rows stand for."""
        return half_scaled(self.grid, self.group_size, self.clip_ratio)

    @cached_property
    def _sizes(self) -> list[int]:
        """The bytes of a row's levels, scales and zero points."""
        levels = packed_bytes(self.width, self.grid.bits)
        return [levels, 2 * self.groups, 0 if self.grid.symmetric else self.groups]

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) without the bytes in between: (..., width)."""
        return self.quantizer.round_trip(x)

    def pass_by_range(self, x: torch.Tensor) -> torch.Tensor:
        """Return round(x): (..., width), with LSQ's gradient."""
        return round_by_range(x, self.quantizer)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8."""
        if self.quantizer.takes_few(x):
            return self._pack_few(self._few_levels(x))
        return self._pack(*self.quantizer.encode(x))

    def encode_and_round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode(x) and what it decodes to, in x's dtype."""
        if self.quantizer.takes_few(x):
            few = self._few_levels(x)
            return self._pack_few(few), torch.from_numpy(few.decode()).view(x.shape).to(x.dtype)
        encoded = self.quantizer.encode(x)
        return self._pack(*encoded), self.quantizer.decode(encoded).to(x.dtype)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., width) behind coded rows."""
        packed, scale_bytes, zero = rows.split(self._sizes, dim=-1)
        wide = torch.promote_types(dtype, torch.float32)
        levels = self.grid.unpack(packed, self.width).to(wide).unflatten(-1, (self.groups, -1))
        scale = from_half_bytes(scale_bytes, wide)[..., None]
        zero = zero.to(wide)[..., None] if not self.grid.symmetric else torch.zeros_like(scale)
        return self.quantizer.decode(Encoded(levels, scale, zero)).to(dtype)

    def _pack(self, levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        parts = [self.grid.pack(levels.flatten(-2))]
        parts.append(half_bytes(scale.squeeze(-1)))
        if not self.grid.symmetric:
            parts.append(zero.squeeze(-1).to(torch.uint8))
        return torch.cat(parts, dim=-1)

    def _few_levels(self, x: torch.Tensor) -> FewLevels:
        """Return levels (..., groups, g) with scale and zero (..., groups, 1)."""
        few = self.quantizer.few(x)
        shape = (*few.levels.shape[:-1], 1)
        return FewLevels(few.levels, few.scale.reshape(shape), few.zero.reshape(shape))

    def _pack_few(self, few: FewLevels) -> torch.Tensor:
        """Return what `_pack` does, in numpy."""
        levels = few.levels.reshape(*few.levels.shape[:-2], -1)
        parts = [pack_few_levels(levels, self.grid.bits, self.grid.lowest)]
        scale = np.ascontiguousarray(few.scale[..., 0].astype(np.float16))  # of strided rows too
        parts.append(scale.view(np.uint8))
        if not self.grid.symmetric:
            parts.append(few.zero[..., 0].astype(np.uint8))
        return torch.from_numpy(np.concatenate(parts, axis=-1))
