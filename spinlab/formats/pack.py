"""Two int4 levels per byte, split by halves of the last dimension.

Byte j of a row holds level j in its low nibble and level j + n/2 in its high nibble, so that a
kernel reads two contiguous runs of levels instead of interleaved ones.
"""

import torch


def pack_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """Pack (..., n) levels in -8..7 or 0..15, n even, into (..., n/2) uint8."""
    low, high = (levels.to(torch.int16) & 0xF).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack_nibbles(packed: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return the (..., n) levels of (..., n/2) bytes: int8 in -8..7 if signed, else uint8."""
    levels = torch.cat((packed & 0xF, packed >> 4), dim=-1)
    # two's complement of 4 bits: move bit 3 to the sign
    return (levels ^ 8).to(torch.int8) - 8 if signed else levels
