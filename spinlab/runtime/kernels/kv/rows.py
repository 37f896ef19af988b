"""Keys or values of one layer in 4 bits, in memory of a fixed size that kernels write and read."""

from dataclasses import dataclass

import torch

from spinlab.errors import InputError
from spinlab.formats.pack import unpack_nibbles
from spinlab.kv.codec import AffineCodec


@dataclass(frozen=True)
class PackedRows:
    """Hold one layer's keys or values for `capacity` tokens, coded as `codec` says.

    packed  (batch, kv_heads, capacity, head_dim/2) uint8: byte j of a row holds levels j (low
            nibble) and j + head_dim/2 (high), each less the grid's lowest level
    scale   (batch, kv_heads, capacity) float16
    zero    (batch, kv_heads, capacity) uint8, or None on a symmetric grid (`middle` stands for it)
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    codec: AffineCodec

    @property
    def capacity(self) -> int:
        return self.packed.shape[2]

    @property
    def head_dim(self) -> int:
        return self.codec.width

    @property
    def middle(self) -> int:
        """Return the nibble of the number 0 on a symmetric grid."""
        return -self.codec.grid.lowest

    @property
    def bytes(self) -> int:
        """Return the bytes that the rows take, filled or not."""
        tensors = (self.packed, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def empty_rows(
    batch: int, kv_heads: int, capacity: int, codec: AffineCodec, device: torch.device | str
) -> PackedRows:
    """Return rows that hold zeros.

    Raises InputError for a codec that does not store one group of nibbles per head.
    """
    if codec.grid.bits > 4 or codec.width % 4 or codec.groups != 1:
        raise InputError(
            f"kv: {codec.grid.bits} bits in {codec.groups} groups over a head of {codec.width} do "
            "not fit packed rows; use at most 4 bits, kv.group_size=0 and a head_dim divisible by 4"
        )
    shape = (batch, kv_heads, capacity)
    zero = None if codec.grid.symmetric else torch.zeros(shape, dtype=torch.uint8, device=device)
    return PackedRows(
        packed=torch.zeros(*shape, codec.width // 2, dtype=torch.uint8, device=device),
        scale=torch.zeros(shape, dtype=torch.float16, device=device),
        zero=zero,
        codec=codec,
    )


def dequantize(rows: PackedRows, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers in the first `length` slots: (batch, kv_heads, length, head_dim)."""
    wide = torch.promote_types(dtype, torch.float32)
    levels = unpack_nibbles(rows.packed[:, :, :length], signed=False).to(wide)
    zero = rows.middle if rows.zero is None else rows.zero[:, :, :length, None].to(wide)
    return (levels - zero).mul_(rows.scale[:, :, :length, None].to(wide)).to(dtype)
