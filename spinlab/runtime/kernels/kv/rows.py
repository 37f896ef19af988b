"""Keys or values of one layer in 4 bits, in memory of a fixed size that kernels write and read."""

from dataclasses import dataclass

import torch

from spinlab.formats.pack import unpack_nibbles
from spinlab.kv.base import PackedLayout


@dataclass(frozen=True)
class PackedRows:
    """Hold one layer's keys or values for `capacity` tokens, coded as `layout` says.

    packed  (batch, kv_heads, capacity, head_dim/2) uint8: byte j of a row holds levels j (low
            nibble) and j + head_dim/2 (high), as the layout codes them
    scale   (batch, kv_heads, capacity) float16
    zero    (batch, kv_heads, capacity) uint8, or None where the layout has none
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    layout: PackedLayout

    @property
    def capacity(self) -> int:
        return self.packed.shape[2]

    @property
    def head_dim(self) -> int:
        return self.layout.width

    @property
    def bytes(self) -> int:
        """Return the bytes that the rows take, filled or not."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return what is stored per slot; slots are dimension 2."""
        parts = (self.packed, self.scale, self.zero)
        return [part for part in parts if part is not None]


def empty_rows(
    batch: int, kv_heads: int, capacity: int, layout: PackedLayout, device: torch.device | str
) -> PackedRows:
    """Return rows that hold zeros."""
    shape = (batch, kv_heads, capacity)
    zero = torch.zeros(shape, dtype=torch.uint8, device=device) if layout.has_zero else None
    return PackedRows(
        packed=torch.zeros(*shape, layout.width // 2, dtype=torch.uint8, device=device),
        scale=torch.zeros(shape, dtype=torch.float16, device=device),
        zero=zero,
        layout=layout,
    )


def dequantize(rows: PackedRows, length: int, dtype: torch.dtype, begin: int = 0) -> torch.Tensor:
    """Return the numbers in the slots from `begin` to `length`: (batch, kv_heads, …, head_dim)."""
    wide, slots = torch.promote_types(dtype, torch.float32), slice(begin, length)
    nibbles = unpack_nibbles(rows.packed[:, :, slots], signed=False)
    zero = None if rows.zero is None else rows.zero[:, :, slots].to(wide)
    return rows.layout.decode(nibbles, rows.scale[:, :, slots].to(wide), zero).to(dtype)
