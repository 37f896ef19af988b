"""DuQuant's dual transform: rotate in blocks, permute the channels, rotate again.

A row x becomes x·R1·P·R2, where R1 and R2 are block diagonal rotations found by a greedy search
for a low peak and P is a zigzag permutation (Lin et al. 2024, arXiv 2406.01721, sec. 3).
"""

import logging
from dataclasses import dataclass

import torch

from spinlab.errors import InputError, ResultError
from spinlab.rotation.blocks import BlockRotation, rotate_blocks
from spinlab.rotation.orthogonal import check_orthogonal

log = logging.getLogger(__name__)


def uniform_first_row(size: int) -> torch.Tensor:
    """Return R~: (size, size) float64 orthogonal, every entry of row 0 equal to 1/sqrt(size).

    The public code multiplies Givens rotations, the i-th one with cos = 1/sqrt(i+2) on columns i
    and i+1 and -sin above its diagonal, and exchanges row and column 0 with the last. That
    product is Helmert's matrix: row i has i+1 ones, then -(i+1), over its norm, and the last row
    is uniform. With +sin above the diagonal the signs of that row would alternate.
    """
    ones = torch.arange(1, size, dtype=torch.float64)
    rows = torch.ones(size, size, dtype=torch.float64).tril() - torch.diag(ones, diagonal=1)
    helmert = rows / rows.norm(dim=1, keepdim=True)
    order = _exchanged(torch.tensor([size - 1]), size)[0]
    return helmert[order][:, order]


def random_mixers(size: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Draw diag(1, Q'), Q' Haar random of order size - 1, for each step: (steps, size, size).

    One float64 sequence serves every search of a model, so the QRs are paid once. The paper draws
    Q' per step; the public code once per search, which is `random_mixers(size, 1, g)` expanded.
    In R~·diag(1, Q') only entry 0 of the first row stays 1/sqrt(size): Q' redraws the others.
    """
    gaussian = torch.randn(steps, size - 1, size - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    mixers = torch.zeros(steps, size, size, dtype=torch.float64)
    mixers[:, 0, 0] = 1
    mixers[:, 1:, 1:] = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None, :]
    return mixers


def greedy_rotation(
    x: torch.Tensor, mixers: torch.Tensor, legacy_index: bool = False
) -> torch.Tensor:
    """Search rotations with a low peak max|x R|: x (batch, rows, size) -> (batch, size, size).

    Step i exchanges (E) channel 0 with the channel of the largest |entry| and appends
    E·R~·mixers[i]·E (sec. 3). The shortest product with the lowest peak is returned, float64;
    the empty one is the identity, so no peak is raised. Each batch element is searched alone.

    `legacy_index` repeats a slip of the public code, which exchanges channel (row of the largest
    entry) mod size, and nothing else of it: the peak stays max|x R|, where that code takes
    max - min, and mixers are those of the caller, where it has one for all steps.
    """
    size = x.shape[-1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = uniform_first_row(size).to(x.device) @ mixers.to(x.device, torch.float64)
    rotation = torch.eye(size, dtype=torch.float64, device=x.device).repeat(x.shape[0], 1, 1)
    lowest, channel = _peak(x, legacy_index)
    best = rotation
    for step in steps:  # nothing here may wait for the device
        order = _exchanged(channel, size)
        rotation = rotation @ step[order[:, :, None], order[:, None, :]]
        # from x itself: chained float32 products would drift from the float64 rotation
        peak, channel = _peak(x @ rotation.to(x.dtype), legacy_index)
        best = torch.where((peak < lowest)[:, None, None], rotation, best)
        lowest = torch.minimum(peak, lowest)
    check_orthogonal("greedy rotation", best)
    return best


def zigzag(peaks: torch.Tensor, block: int) -> torch.Tensor:
    """Return the order (C,) int64 that deals channels to C/block blocks with even mean peaks.

    Channels, highest of `peaks` (C,) first, go to blocks 0, 1, .., K-1, K-1, .., 0, 0, .. and
    stand in their block in this order; x[:, order] is the permuted activation (sec. 3, Theorem 2).
    """
    order = peaks.argsort(descending=True, stable=True).view(block, -1)  # (round, receiving block)
    order[1::2] = order[1::2].flip(1)
    return order.T.flatten()


@dataclass(frozen=True, eq=False)
class DualTransform(BlockRotation):
    """x ↦ x·R1·P·R2: rotations of C/b blocks around a permutation of all C channels.

    first, second: (k, b, b) float64, where k = C/b, or 1 if all blocks share a rotation (Remark 2).
    permutation: (C,) int64, entry j is the channel that moves to place j.
    """

    permutation: torch.Tensor
    second: torch.Tensor

    def __post_init__(self) -> None:
        channels = torch.arange(self.width, device=self.permutation.device)
        if not torch.equal(self.permutation.sort().values, channels):
            raise ResultError("what deals the channels is not a permutation")
        for name in ("first", "second"):
            self._check(name, getattr(self, name))

    @property
    def width(self) -> int:
        return self.permutation.numel()

    def turned(self, wide: torch.Tensor) -> torch.Tensor:
        order = self.permutation.to(wide.device)
        return rotate_blocks(super().turned(wide).index_select(-1, order), self.second)

    def dense(self) -> torch.Tensor:
        """Return the whole matrix R1·P·R2: (C, C), float64."""
        return super().dense()[:, self.permutation] @ self._dense(self.second)


def largest_block(width: int, most: int) -> int:
    """Return the largest block size <= most that divides width: 576 in blocks of 128 gives 96."""
    block = next(b for b in range(min(most, width), 0, -1) if width % b == 0)
    if block != most:
        log.info("width %d has no blocks of %d: taking blocks of %d", width, most, block)
    return block


def dual_transforms(
    x: torch.Tensor, mixers: torch.Tensor, shared: bool = True, legacy_index: bool = False
) -> list[DualTransform]:
    """Search the dual transforms of activations x (n, rows, C): greedy, zigzag, greedy (sec. 3).

    Each of the n is searched alone; on a GPU many small searches take little longer than one.
    mixers: (steps, block, block). `shared` finds one rotation for all blocks at once (Remark 2);
    otherwise each block gets its own. Raises InputError if the block does not divide C.
    """
    width, block = x.shape[-1], mixers.shape[-1]
    if width % block:
        raise InputError(
            f"width {width} is no multiple of block {block}; use {largest_block(width, block)}"
        )

    def search(rows: torch.Tensor) -> torch.Tensor:
        """Return the rotations (n, k, block, block) of activations (n, rows, C)."""
        tiles = rows.unflatten(-1, (-1, block))  # (n, rows, K, block)
        tiles = tiles.flatten(1, 2)[:, None] if shared else tiles.transpose(1, 2)
        return greedy_rotation(tiles.flatten(0, 1), mixers, legacy_index).unflatten(0, (len(x), -1))

    x = x.to(torch.promote_types(x.dtype, torch.float32))
    first = search(x)
    rotated = torch.stack([rotate_blocks(rows, r) for rows, r in zip(x, first, strict=True)])
    orders = [zigzag(rows.abs().amax(0), block) for rows in rotated]
    permuted = torch.stack([rows[:, order] for rows, order in zip(rotated, orders, strict=True)])
    return [DualTransform(*parts) for parts in zip(first, orders, search(permuted), strict=True)]


def _exchanged(channel: torch.Tensor, size: int) -> torch.Tensor:
    """Return, for each channel: (batch,), the indices 0..size-1 with 0 and it exchanged."""
    order = torch.arange(size, device=channel.device).repeat(channel.shape[0], 1)
    order[:, 0] = channel
    return order.scatter_(1, channel[:, None], 0)


def _peak(x: torch.Tensor, legacy_index: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max|x| over (batch, rows, size), and the channel to exchange: (batch,) each."""
    peaks, index = x.abs().amax(2 if legacy_index else 1).max(-1)
    return peaks, index % x.shape[-1]  # the remainder matters to a row only
