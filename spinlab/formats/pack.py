"""Integer levels as dense bytes: a row of n levels of b bits takes b·n/8 bytes.

A level is cut into planes of 8, 4, 2 and 1 bits, those of b in base two (3 bits: its two low bits,
then its high one), and the planes follow one another. A plane of w bits holds 8/w levels to a byte,
split by parts of the row: of 4-bit levels, byte j holds level j in its low nibble and level j + n/2
in its high nibble. So packing is a few operations on whole runs, and a kernel reads runs of levels
instead of interleaved ones.
"""

from typing import TypeVar

import numpy as np
import torch

_Bytes = TypeVar("_Bytes", torch.Tensor, np.ndarray)


def packed_bytes(n: int, bits: int) -> int:
    """Return the bytes of a row of n levels: n·bits/8 where 8 divides n, else each plane rounds up.

    bits: 1..15.
    """
    return sum(-(-n * width // 8) for width, _ in _planes(bits))


def pack_levels(levels: torch.Tensor, bits: int, lowest: int) -> torch.Tensor:
    """Pack (..., n) integer-valued levels into (..., packed_bytes(n, bits)) uint8.

    lowest: the grid's lowest level, subtracted first, so that lowest .. lowest + 2^bits - 1 fit.
    """
    codes = levels.to(torch.int16 if bits <= 8 else torch.int32)
    codes = codes - lowest if lowest else codes
    codes = codes.to(torch.uint8) if bits <= 8 else codes
    planes = [
        _fold((codes >> shift if shift else codes).to(torch.uint8), width)
        for width, shift in _planes(bits)
    ]
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def pack_few_levels(levels: np.ndarray, bits: int, lowest: int) -> np.ndarray:
    """Return what `pack_levels` does for levels of at most 8 bits, in numpy."""
    codes = (levels - lowest if lowest else levels).astype(np.uint8)
    planes = [_fold(codes >> shift, width) for width, shift in _planes(bits)]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def unpack_levels(packed: torch.Tensor, bits: int, n: int, lowest: int) -> torch.Tensor:
    """Return the (..., n) levels of what `pack_levels` packed.

    Up to 8 bits they are uint8, or int8 where lowest is negative, above that int16.
    """
    planes = _planes(bits)
    parts = packed.split([-(-n * width // 8) for width, _ in planes], dim=-1)
    dtype = torch.uint8 if bits <= 8 else torch.int16
    found = [
        _unfold(part, width)[..., :n].to(dtype)
        for part, (width, _) in zip(parts, planes, strict=True)
    ]
    codes = found[0]  # whose lowest bit is that of the level
    for plane, (_, shift) in zip(found[1:], planes[1:], strict=True):
        codes = codes | plane << shift
    if bits <= 8 and lowest:
        codes = codes.view(torch.int8)  # a byte counts modulo 256: the sum below is in range
    return codes + lowest if lowest else codes


def pack_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """Pack (..., n) levels in -8..7 or 0..15, n even, into (..., n/2) uint8."""
    return pack_levels(levels.to(torch.int16) & 0xF, 4, 0)


def unpack_nibbles(packed: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the (..., n) levels of (..., n/2) bytes: int8 in -8..7 if signed, else uint8."""
    levels = _unfold(packed, 4)
    # two's complement of 4 bits: move bit 3 to the sign
    return (levels ^ 8).to(torch.int8) - 8 if signed else levels


def _planes(bits: int) -> list[tuple[int, int]]:
    """Return the width of each plane and the position of its lowest bit in a level."""
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return [(width, sum(widths[:i])) for i, width in enumerate(widths)]


def _fold(plane: _Bytes, width: int) -> _Bytes:
    """Put the low bits of 8/width parts of the last dimension of uint8s into one."""
    if width == 8:
        return plane
    mask = (1 << width) - 1
    size = -(-plane.shape[-1] * width // 8)
    folded = plane[..., :size] & mask
    for i in range(1, 8 // width):
        part = plane[..., i * size : (i + 1) * size]
        if (i + 1) * width < 8:  # of the last part the shift leaves no more
            part = part & mask
        filled = folded[..., : part.shape[-1]]
        filled |= part << i * width
    return folded


def _unfold(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return what `_fold` put together, and after it what fills the last bytes."""
    if width == 8:
        return packed
    mask, last = (1 << width) - 1, 8 - width
    middle = [packed >> i & mask for i in range(width, last, width)]
    return torch.cat([packed & mask, *middle, packed >> last], dim=-1)
