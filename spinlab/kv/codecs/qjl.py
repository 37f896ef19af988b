"""QJL: signs of a sketch, and the norm, in float16 (Zandieh et al. 2024, arXiv 2406.03482).

Channels whose energy over a run of tokens is largest may have signs and a norm of their own.
"""

from dataclasses import dataclass

import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats.integer import at_least_float32
from spinlab.kv.base import RowCodec, from_half_bytes, half_bytes
from spinlab.kv.sketch import Sketch, draw_sketch

_MOST_CHANNELS = 256  # a byte names one


@dataclass(frozen=True, eq=False)
class QJLCodec(RowCodec):
    """Code a head by the signs of its sketch.

    A row holds signs and norm of every token; with outliers, those of the outliers too, and which
    channels they are.
    """

    reads = ("qjl", "run")
    width: int
    sketch: Sketch
    outliers: int = 0
    outlier_sketch: Sketch | None = None
    tokens: int = 1

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "QJLCodec":
        """Make the codec of a setting. Raises InputError for outliers that a head does not have."""
        own, bits = settings.qjl, settings.bits
        sketch = draw_sketch(bits * width, width, own.orthogonal, generator)
        if not own.outliers:
            return cls(width, sketch)
        if own.outliers >= width or width > _MOST_CHANNELS:
            raise InputError(
                f"{name}.qjl.outliers={own.outliers} of heads of {width} numbers: there must be "
                f"fewer outliers than numbers, and at most {_MOST_CHANNELS} numbers"
            )
        second = draw_sketch(own.outlier_bits * width, width, own.orthogonal, generator)
        return cls(width, sketch, own.outliers, second, settings.run)

    @property
    def run(self) -> int:
        return self.tokens

    @property
    def row_bytes(self) -> int:
        return self.run * sum(part.row_bytes + 2 for part in self._sketches) + self.outliers

    @property
    def _sketches(self) -> list[Sketch]:
        return [self.sketch, *([self.outlier_sketch] if self.outlier_sketch else [])]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width), with outliers (..., runs·run, width), as (…, row_bytes) uint8."""
        x = at_least_float32(x)
        if not self.outliers:
            return _signed(self.sketch, x)
        runs = x.unflatten(-2, (-1, self.run))
        largest = runs.square().sum(-2).topk(self.outliers, dim=-1).indices.sort(-1).values
        apart = self._mask(largest)
        parts = (runs.masked_fill(apart, 0), runs.masked_fill(~apart, 0))
        rows = [_signed(s, part) for s, part in zip(self._sketches, parts, strict=True)]
        return torch.cat((torch.cat(rows, -1).flatten(-2), largest.to(torch.uint8)), -1)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the vectors (..., width) whose products with queries are QJL's estimates."""
        like = rows.new_empty(0, dtype=torch.promote_types(dtype, torch.float32))
        if not self.outliers:
            return _estimate(self.sketch, rows, like).to(dtype)
        largest = rows[..., -self.outliers :].long()
        tokens = rows[..., : -self.outliers].unflatten(-1, (self.run, -1))
        parts = tokens.split([s.row_bytes + 2 for s in self._sketches], dim=-1)
        inside, outside = (
            _estimate(s, part, like) for s, part in zip(self._sketches, parts, strict=True)
        )
        return inside.where(~self._mask(largest), outside).flatten(-3, -2).to(dtype)

    def _mask(self, channels: torch.Tensor) -> torch.Tensor:
        """Return where channels (..., runs, outliers) are: (..., runs, 1, width) bool."""
        found = channels.new_zeros(*channels.shape[:-1], self.width, dtype=torch.bool)
        return found.scatter_(-1, channels, True)[..., None, :]


def _signed(sketch: Sketch, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((sketch.signs(x), half_bytes(x.norm(dim=-1, keepdim=True))), -1)


def _estimate(sketch: Sketch, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    signs, norm = rows.split([sketch.row_bytes, 2], dim=-1)
    return sketch.direction(signs, like) * from_half_bytes(norm, like.dtype)
