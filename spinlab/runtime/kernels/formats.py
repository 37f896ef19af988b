"""What kernels hand to each other: quantized inputs and packed weights, each with its scales.

With input level a, scale s, zero point z and weight level w, scale t, zero point u, a block of n
columns adds s·t·I to an output, where

    I = Σ (a - z)(w - u) = Σ a·w - z·Σ w - u·(Σ a - n·z)

is an integer that int32 holds exactly. Blocks are those of the finer grouping of the two.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from spinlab.formats import Format
from spinlab.formats.pack import pack_nibbles, unpack_nibbles
from spinlab.weights.quantized import QuantizedWeight


class TokenLevels(NamedTuple):
    """Hold quantized inputs of some tokens; groups divide the width evenly.

    levels  (tokens, width)  int8, level - shift: 0..15 or -8..7, or a byte less 128
    scale   (tokens, groups) float32 (float64 in float64 networks)
    zero    (tokens, groups) int32, zero point - shift
    sums    (tokens, groups) int32, Σ levels of the group; None where they were not asked for
    """

    levels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    sums: torch.Tensor | None

    def sums_of(self, blocks: int) -> torch.Tensor:
        """Return Σ levels of so many blocks: (tokens, blocks) int32, found here if they lack."""
        if self.sums is not None and self.sums.shape[1] == blocks:
            return self.sums
        return self.levels.unflatten(1, (blocks, -1)).sum(2, dtype=torch.int32)


@dataclass(frozen=True)
class PackedWeight:
    """Hold a weight (out, in) of at most 4 bits, packed for kernels.

    A level takes 4 bits here, also where its format has 2 or 3: they are stored, and counted in
    `bits/weights`, as what they are, but there are no kernels that read them so.

    packed  (out, in/2) uint8: within every `chunk` columns, byte j holds the signed nibbles of
            columns j (low) and j + chunk/2 (high)
    scale   (out, groups) float32 (float64 in float64 networks)
    zero    (out, groups) int32, or None on a symmetric grid
    sums    (out, blocks) int32, Σ levels of a block
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    sums: torch.Tensor
    chunk: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def blocks(self) -> int:
        return self.sums.shape[1]

    def levels(self) -> torch.Tensor:
        """Return the levels (out, in), int8 in -8..7."""
        chunks = self.packed.unflatten(1, (-1, self.chunk // 2))
        return unpack_nibbles(chunks, signed=True).flatten(1)

    def to(self, device: torch.device) -> "PackedWeight":
        """Return the same weight on a device."""
        moved = {n: getattr(self, n) for n in ("packed", "scale", "zero", "sums")}
        moved = {n: None if t is None else t.to(device) for n, t in moved.items()}
        return replace(self, **moved)


def pack_weight(
    weight: QuantizedWeight, input_groups: int, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """Pack a weight of at most 4 bits for inputs with so many groups.

    The groups of weight and input must nest. dtype: of the scales.
    """
    assert weight.format.is_int4, "only weights of at most 4 bits are packed"
    width = weight.levels.shape[1]
    blocks = max(weight.groups, input_groups)
    assert blocks % weight.groups == blocks % input_groups == 0, "groups do not nest"
    assert width % (2 * blocks) == 0, "a byte holds two columns of one block"
    shift = _into_nibble(weight.format)
    levels = (weight.levels - shift).to(torch.int8).unflatten(1, (blocks, -1))
    zero = None if weight.format.symmetric else (weight.zero - shift).to(torch.int32)
    return PackedWeight(
        packed=pack_nibbles(levels).flatten(1),
        scale=weight.scale.to(dtype),
        zero=zero,
        sums=levels.sum(2, dtype=torch.int32),
        chunk=width // blocks,
    )


def _into_nibble(format: Format) -> int:
    """Return what levels and zero points are shifted down by: an asymmetric nibble reaches 15."""
    return 0 if format.highest <= 7 else 8


def into_int8(format: Format) -> int:
    """Return what levels and zero points are shifted down by: an asymmetric byte reaches 255."""
    return 0 if format.highest <= 127 else 128
