"""Transforms of a linear's input in blocks: no number meets one of another block."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch

from spinlab.errors import ResultError
from spinlab.rotation.orthogonal import check_orthogonal

log = logging.getLogger(__name__)


def rotate_blocks(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply each block of x: (..., C) by its rotation, or by the one shared: (k, b, b)."""
    count, size, _ = rotation.shape
    rotation = rotation.to(x.device, x.dtype)
    if count == 1:
        return (x.unflatten(-1, (-1, size)) @ rotation[0]).flatten(-2)
    tiles = x.unflatten(-1, (count, size)).reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(tiles, rotation).transpose(0, 1).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class BlockMap(ABC):
    """x ↦ x·T for inputs, T block diagonal, and W ↦ W·T⁻ᵀ for the weights behind them.

    first: (k, b, b) float64, one for each of k blocks.
    """

    first: torch.Tensor

    @property
    def width(self) -> int:
        return self.first.shape[0] * self.first.shape[1]

    @abstractmethod
    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W·T⁻ᵀ for W: (out, C), in float32 or wider: (x·T)(W·T⁻ᵀ)ᵀ = x Wᵀ."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·T for x: (..., C), computed in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.turned(wide).to(x.dtype)

    def turned(self, wide: torch.Tensor) -> torch.Tensor:
        """Return x·T for x: (..., C), computed in its own dtype."""
        return rotate_blocks(wide, self.first)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float64) -> Self:
        """Return the transform on `device`, so that apply copies and casts nothing there.

        Give the dtype of the inputs; a 16-bit one means float32, in which apply then computes.
        """
        wide = torch.promote_types(dtype, torch.float32)
        moved = {
            name: part.to(device, wide if part.is_floating_point() else None)
            for name, part in vars(self).items()
        }
        return type(self)(**moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what has to be stored, by name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """Restore a transform from `tensors()`."""
        return cls(**{name: tensors[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, eq=False)
class BlockRotation(BlockMap):
    """x ↦ x·R1, block diagonal: what weights get is the same."""

    def __post_init__(self) -> None:
        self._check("first", self.first)

    def _check(self, name: str, rotation: torch.Tensor) -> None:
        """Raise ResultError for blocks that are no rotations, or do not tile the width."""
        k, b, _ = rotation.shape
        if self.width % b or k not in (1, self.width // b):
            raise ResultError(
                f"the {name} rotation {tuple(rotation.shape)} does not tile width {self.width}"
            )
        check_orthogonal(f"{name} rotation", rotation)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.apply(weight)

    def dense(self) -> torch.Tensor:
        """Return the whole matrix: (C, C), float64."""
        return self._dense(self.first)

    def _dense(self, blocks: torch.Tensor) -> torch.Tensor:
        count = self.width // blocks.shape[-1]
        return torch.block_diag(*blocks.double().expand(count, -1, -1))


@dataclass(frozen=True, eq=False)
class InvertibleBlocks(BlockMap):
    """x ↦ x·T with blocks that are no rotations: weights get the inverse, when they are fused.

    Files call them `matrix`: what stands as `first` there is orthogonal.
    """

    def __post_init__(self) -> None:
        if not self.first.isfinite().all():
            raise ResultError("a transform of an input holds numbers that are not finite")

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return rotate_blocks(weight, inverse_transposed(self.first))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"matrix": self.first}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        return cls(tensors["matrix"])


def inverse_transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return T⁻ᵀ of matrices (..., b, b), in float64; not finite where there is none."""
    inverse, failed = torch.linalg.inv_ex(matrix.double())
    return inverse.mT.masked_fill((failed != 0)[..., None, None], torch.nan)


def inverse_error(matrix: torch.Tensor) -> float:
    """Return max|T·T⁻¹ - I| over (..., b, b), in float64: how well a map can be undone."""
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    return (matrix.double() @ inverse_transposed(matrix).mT - eye).abs().max().item()


def power_block(width: int, most: int) -> int:
    """Return the largest power of two <= most that divides width: 576 with 128 gives 64."""
    block = min(width & -width, most)
    if block != most:
        log.info("width %d has no blocks of %d: taking blocks of %d", width, most, block)
    return block
