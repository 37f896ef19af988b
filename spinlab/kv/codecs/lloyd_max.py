"""Lloyd-Max levels for the numbers of a rotated unit vector (TurboQuant, arXiv 2504.19874).

A rotated head of norm 1 has numbers of one known density; their best levels need no range, and no
sample. The product form spends one bit a number on the signs of a sketch of what is left over, so
that products have no bias (`spinlab.kv.sketch`), at the cost of variance.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats.integer import at_least_float32
from spinlab.formats.pack import pack_levels, packed_bytes, unpack_levels
from spinlab.kv.base import OwnTensor, RowCodec, from_half_bytes, half_bytes
from spinlab.kv.layouts import LevelsLayout
from spinlab.kv.sketch import Sketch, draw_sketch
from spinlab.rotation.orthogonal import exact_hadamard, random_orthogonal

_NODES = 200  # of Gauss-Legendre quadrature, per level


@dataclass(frozen=True, eq=False)
class LloydMaxCodec(RowCodec):
    """Code a head as levels of its rotated direction, and a length in float16.

    layout: of levels and length. sketch: of what levels leave, with its norm in float16 behind the
    length.
    """

    reads = ("lloyd_max",)
    width: int
    level_bits: int
    layout: LevelsLayout
    rotation: OwnTensor | None
    sketch: Sketch | None

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "LloydMaxCodec":
        """Make the codec of a setting. Raises InputError for bits that it does not have."""
        own = settings.lloyd_max
        bits, least = settings.bits - own.residual, 1 + own.residual
        if not least <= settings.bits <= 8:
            raise InputError(
                f"{name}.bits={settings.bits}: lloyd_max codes {least} to 8 bits"
                f"{', one of them for the residual' if own.residual else ''}; 16 switches it off"
            )
        rotation = None
        if own.turn != "none":
            random = own.turn == "random"
            rotation = random_orthogonal(width, generator) if random else exact_hadamard(width)
        levels = torch.from_numpy(lloyd_max_levels(width, bits).astype(np.float16))
        return cls(
            width=width,
            level_bits=bits,
            layout=LevelsLayout(width, OwnTensor(levels), own.length),
            rotation=None if rotation is None else OwnTensor(rotation),
            sketch=draw_sketch(width, width, True, generator) if own.residual else None,
        )

    @property
    def row_bytes(self) -> int:
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        """The bytes of levels, length, and signs and norm of the residual."""
        residual = [self.sketch.row_bytes, 2] if self.sketch else []
        return [packed_bytes(self.width, self.level_bits), 2, *residual]

    @property
    def packed(self) -> LevelsLayout | None:
        """Kernels take levels of at most 4 bits alone, of heads whose bytes they read in pairs."""
        alone = self.rotation is None and self.sketch is None
        return self.layout if alone and self.level_bits <= 4 and self.width % 4 == 0 else None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8."""
        x = at_least_float32(x)
        y = x if self.rotation is None else x @ self.rotation.like(x)
        places, length, _ = self.layout.encode(y)
        parts = [pack_levels(places, self.level_bits, 0), half_bytes(length[..., None])]
        if self.sketch is not None:
            rest = y - self.layout.decode(places, length.to(y.dtype), None)
            parts += [self.sketch.signs(rest), half_bytes(rest.norm(dim=-1, keepdim=True))]
        return torch.cat(parts, dim=-1)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., width) behind coded rows."""
        like = rows.new_empty(0, dtype=torch.promote_types(dtype, torch.float32))
        packed, halves, *residual = rows.split(self._sizes, dim=-1)
        length = from_half_bytes(halves, like.dtype).squeeze(-1)
        places = unpack_levels(packed, self.level_bits, self.width, 0)
        y = self.layout.decode(places, length, None)
        if self.sketch is not None:
            signs, norm = residual
            y = y + self.sketch.direction(signs, like) * from_half_bytes(norm, like.dtype)
        return (y if self.rotation is None else y @ self.rotation.like(y).mT).to(dtype)


@cache
def lloyd_max_levels(width: int, bits: int) -> np.ndarray:
    """Return the 2^bits levels of least squared error for a number of a random unit vector, rising.

    The density of a number x is proportional to (1 - x²)^((width-3)/2), with x = sin(t) to
    cos(t)^(width-2): levels are means of their cells, whose ends lie midway (Lloyd 1982; Max 1960).
    Raises InputError for a width below 2.
    """
    if width < 2:
        raise InputError(f"lloyd_max codes heads of 2 numbers or more, not of {width}")
    half = 1 << (bits - 1)
    levels = (np.arange(half) + 0.5) / half * min(1.0, 3 / width**0.5)
    for _ in range(50):  # 6 are enough to width 8192
        ends = np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [1.0]))
        found, mass = _cells(width, ends)
        if np.abs(found - levels).max() < 1e-14:
            break
        # Newton: to move to the means, as Lloyd does, takes thousands of rounds from 6 bits on
        slope = np.eye(half) - _slope_of_means(width, ends, found, mass)
        levels = levels + np.linalg.solve(slope, found - levels)
    assert levels[0] > 0 and levels[-1] < 1 and (np.diff(levels) > 0).all()
    return np.concatenate((-levels[::-1], levels))


def _cells(width: int, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the mass of every cell between rising ends (n + 1,)."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    low, high = np.arcsin(ends[:-1, None]), np.arcsin(ends[1:, None])
    t = (low + high) / 2 + nodes * (high - low) / 2
    density = weights * np.exp((width - 2) * np.log(np.cos(t).clip(min=1e-300)))
    mass = density.sum(1)
    return (density * np.sin(t)).sum(1) / mass, mass * (high - low)[:, 0] / 2


def _slope_of_means(
    width: int, ends: np.ndarray, means: np.ndarray, mass: np.ndarray
) -> np.ndarray:
    """Return how means of cells (n,) follow levels, halfway between which they end: (n, n)."""
    inner = ends[1:-1]
    half_density = (1 - inner * inner) ** ((width - 3) / 2) / 2
    below = half_density * (inner - means[:-1]) / mass[:-1]  # of the cell that ends there
    above = half_density * (means[1:] - inner) / mass[1:]  # of the one that starts there
    own = np.append(below, 0) + np.insert(above, 0, 0)
    return np.diag(own) + np.diag(below, 1) + np.diag(above, -1)
