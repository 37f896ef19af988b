"""What the two caches and the kernels know of a codec, and what a layer of the cache is.

A codec codes the numbers of one head of one token by themselves, as one row of bytes, so that
appending, cropping, reordering and repeating work on coded rows as they do on floats. One that
needs more than a token (keys per channel, as KIVI has them) codes a run of tokens as one row; the
tokens of an unfinished run stay in floats (`spinlab.kv.history`).
"""

from dataclasses import replace
from typing import ClassVar, Protocol

import torch

from spinlab.config import CodecConfig
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import StraightThrough, TokenQuantizer


def half_scaled(
    grid: IntegerFormat, group_size: int = 0, clip_ratio: float = 1.0
) -> TokenQuantizer:
    """Return what quantizes numbers as a cache stores them, with scales in float16."""
    return TokenQuantizer(replace(grid, half_scale=True), group_size, clip_ratio)


class PackedLayout(Protocol):
    """Say how kernels hold a codec's rows: what `spinlab.runtime.kernels.kv.rows` lays out.

    A head of `width` numbers is one group: a nibble per number, a float16 scale and, with
    `has_zero`, a byte of zero point (`spinlab.kv.layouts`).
    """

    width: int

    @property
    def has_zero(self) -> bool: ...

    @property
    def row_bytes(self) -> int:
        return self.width // 2 + (3 if self.has_zero else 2)

    @property
    def bits(self) -> float:
        """Return the stored bits per number, scale and zero point counted."""
        return 8 * self.row_bytes / self.width

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return nibbles (..., width) and zero points (...,) in uint8, scales (...,) in float16."""
        ...

    def decode(
        self, nibbles: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the numbers (..., width) behind nibbles, and floats (...,), in their dtype."""
        ...


def in_half(x: torch.Tensor) -> torch.Tensor:
    """Return numbers in float16, or what it has nearest to them."""
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most).to(torch.float16)


def half_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return numbers (..., n) in float16, or what it has nearest to them, as (..., 2n) uint8."""
    return in_half(x).contiguous().view(torch.uint8)


def from_half_bytes(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers (..., n) behind float16s (..., 2n)."""
    # contiguous() would leave odd strides to dimensions of size 1
    whole = rows.clone(memory_format=torch.contiguous_format)
    return whole.view(torch.float16).to(dtype)


class OwnTensor:
    """Hold a tensor that a codec owns, moved once to every device and dtype that asks for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copies = {(tensor.device, tensor.dtype): tensor}
        self.first = tensor

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Return it on x's device, in x's dtype or float32 if that is wider."""
        place = x.device, torch.promote_types(x.dtype, torch.float32)
        if place not in self._copies:
            self._copies[place] = self.first.to(*place)
        return self._copies[place]


class RowCodec(Protocol):
    """Code heads of `width` numbers, of `run` tokens, as rows of `row_bytes` bytes, each by itself.

    Codecs are compared by ==: equal ones code alike, so that keys and values go together. A codec
    that owns tensors, as OwnTensors, is equal to itself alone (`dataclass(eq=False)`).
    """

    reads: ClassVar[tuple[str, ...]] = ()  # settings beside the bits
    width: int

    @property
    def run(self) -> int:
        """Return how many tokens a row is of."""
        return 1

    @classmethod
    def make(
        cls, name: str, settings: CodecConfig, width: int, generator: torch.Generator
    ) -> "RowCodec":
        """Make the codec of a setting (name: `kv.keys` …) for heads of `width` numbers.

        Tensors of its own come from the generator. Raises InputError for what it does not take.
        """
        ...

    @property
    def row_bytes(self) -> int: ...

    @property
    def bits(self) -> float:
        """Return the stored bits per number, all that a row holds counted."""
        return 8 * self.row_bytes / (self.width * self.run)

    @property
    def packed(self) -> PackedLayout | None:
        """Say how GPU kernels lay the rows out; None where they cannot take the codec."""
        return None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Code x: (..., width) as (..., row_bytes) uint8, runs as (..., tokens/run, row_bytes)."""
        ...

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (..., width) behind coded rows."""
        ...

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Return decode(encode(x)) in x's dtype: (..., width)."""
        return self.decode(self.encode(x), x.dtype)

    def pass_through(self, x: torch.Tensor) -> torch.Tensor:
        """Return round(x) with a gradient: that of x passes straight through."""
        return StraightThrough.apply(x, self.round)  # type: ignore[no-any-return]

    def pass_by_range(self, x: torch.Tensor) -> torch.Tensor:
        """Return round(x) with a gradient that knows how x sets the range, where there is one.

        What is learned right before the codec (`spinlab.learn.spaces.heads`) needs it.
        """
        return self.pass_through(x)

    def encode_and_round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode(x) for x: (..., width), and what it decodes to in x's dtype."""
        rows = self.encode(x)
        return rows, self.decode(rows, x.dtype)


class CacheLayer(Protocol):
    """Keep the keys and values of one layer. All are (batch, kv_heads, tokens, head_dim)."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens and return all that are stored, as floats in the dtype of the new."""
        ...

    def round(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `append` does on an empty layer, and store nothing.

        Gradients are those of codecs' `pass_through`.
        """
        ...

    def crop(self, tokens: int) -> None:
        """Keep the first tokens, so many; more than there are change nothing."""
        ...

    def reorder(self, sequences: torch.Tensor) -> None:
        """Take these sequences (on any device), in this order: some twice, others never.

        It is called only where tokens are stored.
        """
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    @property
    def tokens(self) -> int:
        """Return how many tokens are stored."""
        ...

    @property
    def sequences(self) -> int:
        """Return how many sequences they belong to: the batch, 0 where nothing is stored."""
        ...

    @property
    def bytes(self) -> int:
        """Return the bytes that they take."""
        ...
