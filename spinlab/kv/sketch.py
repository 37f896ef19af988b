"""Signs of a Gaussian sketch: an unbiased estimate of products from one bit a row (QJL).

For a vector k of norm 1, rows s and any q, E[<s,q> sign(<s,k>)] is a constant times <q,k>
(arXiv 2406.03482, lemma 3.2): sqrt(2/pi) for Gaussian rows. What m rows say of q is the product of
q and one vector, so that a codec can give that vector back: `Sketch.direction`.
"""

import math
from dataclasses import dataclass

import torch

from spinlab.formats.pack import pack_levels, packed_bytes, unpack_levels
from spinlab.kv.base import OwnTensor


@dataclass(frozen=True, eq=False)
class Sketch:
    """Hold m rows: (m, width). factor: 1/m over the constant."""

    rows: OwnTensor
    count: int
    factor: float

    @property
    def row_bytes(self) -> int:
        return packed_bytes(self.count, 1)

    def signs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the signs of x (..., width), packed: (..., row_bytes) uint8."""
        return pack_levels((x @ self.rows.like(x).mT > 0).to(torch.uint8), 1, 0)

    def direction(self, signs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return an unbiased estimate of x/|x| (..., width) from its packed signs."""
        levels = unpack_levels(signs, 1, self.count, 0).to(like.dtype)
        return (2 * levels - 1) @ (self.rows.like(like) * self.factor)


def draw_sketch(count: int, width: int, orthogonal: bool, generator: torch.Generator) -> Sketch:
    """Draw a sketch of so many rows for vectors of `width` numbers.

    orthogonal: as many rows at a time as there are numbers are made orthogonal, and sqrt(width)
    long (sec. 4.1). A single one then is uniform on a sphere, where the constant is
    sqrt(width)·E|u_1| of a unit vector u, a little more than sqrt(2/pi).
    """
    if not orthogonal:
        rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return Sketch(OwnTensor(rows), count, math.sqrt(math.pi / 2) / count)
    blocks = -(-count // width)
    drawn = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # uniform, whatever the routine's signs
    rows = q.mT.flatten(0, 1)[:count] * math.sqrt(width)
    ratio = math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2))
    constant = math.sqrt(width / math.pi) * ratio
    return Sketch(OwnTensor(rows.contiguous()), count, 1 / (count * constant))
