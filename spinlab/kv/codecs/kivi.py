"""KIVI's keys: an affine grid per channel over a run of tokens (Liu et al. 2024, arXiv 2402.02750).

Channels of keys differ in size more than tokens do. Its values are those of `affine`, its window of
floats is `kv.window`.
"""

from dataclasses import dataclass

import torch

from spinlab.config import CodecConfig
from spinlab.kv.base import RowCodec
from spinlab.kv.codecs.affine import AffineCodec


@dataclass(frozen=True)
class KIVICodec(RowCodec):
    """Code every channel of a run of tokens on a grid of its own."""

    reads = ("symmetric", "clip_ratio", "run")
    channel: AffineCodec  # as wide as a run is long
    width: int

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "KIVICodec":
        """Make the codec of a setting. Raises InputError for bits that no grid has."""
        return cls(AffineCodec.ungrouped(name, settings, settings.run), width)

    @property
    def run(self) -> int:
        return self.channel.width

    @property
    def row_bytes(self) -> int:
        return self.width * self.channel.row_bytes

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., runs·run, width) as (..., runs, row_bytes) uint8."""
        return self.channel.encode(self._by_channel(x)).flatten(-2)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., runs·run, width) behind coded rows."""
        channels = rows.unflatten(-1, (self.width, -1))
        return self.channel.decode(channels, dtype).mT.flatten(-3, -2)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) without the bytes in between."""
        return self.channel.round(self._by_channel(x)).mT.flatten(-3, -2)

    def pass_by_range(self, x: torch.Tensor) -> torch.Tensor:
        """Return round(x) with the gradient of the grids."""
        return self.channel.pass_by_range(self._by_channel(x)).mT.flatten(-3, -2)

    def _by_channel(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-2, (-1, self.run)).mT.contiguous()
