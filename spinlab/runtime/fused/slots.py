"""The memory of the runtime's cache: slots of fixed places, so that a CUDA graph can write them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from spinlab.kv.base import PackedLayout, RowCodec
from spinlab.kv.bias import POSITION_BITS
from spinlab.kv.history import History
from spinlab.kv.path import Sides
from spinlab.runtime.kernels.kv.floats import FloatTokens, empty_tokens
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize, empty_rows


@dataclass(frozen=True)
class PlainRows:
    """Hold keys or values (batch, kv_heads, capacity, width): floats, or bytes of any codec."""

    data: torch.Tensor
    codec: RowCodec | None
    dtype: torch.dtype

    def write(self, x: torch.Tensor, position: torch.Tensor) -> None:
        """Store x: (batch, kv_heads, tokens, head_dim) from slot `position` (1,) on."""
        index = position + torch.arange(x.shape[2], device=position.device)
        self.data.index_copy_(2, index, x if self.codec is None else self.codec.encode(x))

    def read(self, length: int, begin: int = 0) -> torch.Tensor:
        """Return rows from `begin` to `length` as floats: (batch, kv_heads, …, head_dim)."""
        rows = self.data[:, :, begin:length]
        return rows if self.codec is None else self.codec.decode(rows, self.dtype)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return what is stored per slot; slots are dimension 2."""
        return [self.data]


Rows = PackedRows | PlainRows


def numbers_of(rows: Rows, length: int, dtype: torch.dtype, begin: int = 0) -> torch.Tensor:
    """Return rows from `begin` to `length` as floats, packed ones in a dtype."""
    if isinstance(rows, PlainRows):
        return rows.read(length, begin)
    return dequantize(rows, length, dtype, begin)


@dataclass(frozen=True)
class Layout:
    """Say what a model keeps of a token: heads and their width, and the codecs of every layer.

    histories: which tokens of a layer are in floats beside their codes. window: how far back a
    token may look, or None. there: the layers that the model has. positions: they are kept, for
    biases of keys that are apart (`spinlab.kv.bias`).
    """

    kv_heads: int
    head_dim: int
    sides: tuple[Sides, ...]
    histories: tuple[History, ...]
    window: int | None
    dtype: torch.dtype
    device: torch.device
    there: tuple[int, ...]
    positions: bool = False

    @property
    def layers(self) -> int:
        return len(self.sides)

    def packed(self, layer: int) -> tuple[PackedLayout, PackedLayout] | None:
        """How keys and values lie where kernels read both; otherwise torch codes and decodes."""
        keys, values = (None if codec is None else codec.packed for codec in self.sides[layer])
        return None if keys is None or values is None else (keys, values)

    @property
    def in_torch(self) -> list[str]:
        """Name the pairs of codecs, where there are any, that no kernel reads."""
        rest = [s for n, s in enumerate(self.sides) if any(s) and self.packed(n) is None]
        names = (" and ".join("16 bits" if c is None else _name(c) for c in s) for s in rest)
        return list(dict.fromkeys(names))

    def bits(self, tokens: int) -> float:
        """Return stored bits per number of sequences of so many tokens.

        They are the mean of keys and values, positions and tokens in floats beside them, which
        count 16 bits a number.
        """
        kept = [side for n, sides in enumerate(self.sides) for side in self.packed(n) or sides]
        numbers = 2 * self.layers * self.kv_heads * self.head_dim  # of a token
        shared = POSITION_BITS / numbers if self.positions else 0
        floats = sum(history.sinks + history.window for history in self.histories)
        shared += 16 * floats / (self.layers * tokens)
        return sum(16.0 if side is None else side.bits for side in kept) / len(kept) + shared

    def rows(self, layer: int, batch: int, capacity: int) -> tuple[Rows, Rows]:
        """Return empty rows of one layer, for keys and for values."""
        if (packed := self.packed(layer)) is not None:
            keys, values = (
                empty_rows(batch, self.kv_heads, capacity, layout, self.device) for layout in packed
            )
            return keys, values
        keys, values = (self._plain(codec, batch, capacity) for codec in self.sides[layer])
        return keys, values

    def floats(self, start: torch.Tensor) -> dict[int, FloatTokens]:
        """Return room for tokens in floats, by layer; start: (batch,), where sequences begin."""
        shape, found = (len(start), self.kv_heads, self.head_dim), {}
        for layer in self.there:
            kept = self.histories[layer].sinks, self.histories[layer].window
            if any(kept):
                found[layer] = empty_tokens(shape, kept, start, self.dtype)
        return found

    def _plain(self, codec: RowCodec | None, batch: int, capacity: int) -> PlainRows:
        width, dtype = self.head_dim, self.dtype
        if codec is not None:
            width, dtype = codec.row_bytes, torch.uint8
        shape = (batch, self.kv_heads, capacity, width)
        return PlainRows(torch.zeros(shape, dtype=dtype, device=self.device), codec, self.dtype)


def _name(codec: RowCodec) -> str:
    return f"{type(codec).__name__} of {codec.bits:.3g} bits"


class Slots:
    """Hold the memory of one cache, and the CUDA graphs that were captured on it.

    start     (batch,) int32: first valid slot of a sequence, behind its padding
    position  (1,) int64: slot of the first token of this pass
    length    (1,) int64: slots in use, those of this pass counted
    positions (batch, 1, capacity) int32: of the tokens in the slots, where the layout keeps them
    """

    def __init__(self, layout: Layout, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.graphs: dict[object, object] = {}  # by what of a pass is captured
        # tensors made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.rows = {n: layout.rows(n, batch, capacity) for n in layout.there}
            self.start = torch.zeros(batch, dtype=torch.int32, device=layout.device)
            self.floats = layout.floats(self.start)
            self.position = torch.zeros(1, dtype=torch.int64, device=layout.device)
            self.length = torch.zeros(1, dtype=torch.int64, device=layout.device)
            self.positions = None
            if layout.positions:
                shape = (batch, 1, capacity)
                self.positions = torch.zeros(shape, dtype=torch.int32, device=layout.device)

    def tensors(self) -> list[torch.Tensor]:
        """Return what is stored per slot; slots are dimension 2."""
        shared = [] if self.positions is None else [self.positions]
        return [t for pair in self.rows.values() for rows in pair for t in rows.tensors] + shared

    def kept(self) -> list[torch.Tensor]:
        """Return what is stored of tokens in floats, whose places are dimension 2."""
        return [tensor for floats in self.floats.values() for tensor in floats.tensors]

    def rewind(self, old: int, new: int) -> None:
        """Forget the slots new..old-1.

        Tokens that come into a window of floats again are what the codes stand for.
        """
        for layer, floats in self.floats.items():
            begin, end = max(new - floats.window, 0), min(old - floats.window, new)
            if begin < end:
                keys, values = (
                    numbers_of(rows, end, floats.keys.dtype, begin) for rows in self.rows[layer]
                )
                floats.restore(keys, values, begin)
        self.length.fill_(new)


@dataclass
class SlotPool:
    """Make slots, and keep those of the last cache that died: with them live their graphs.

    A deep copy, of a model that was copied, has no slots: graphs run on the original's weights.
    """

    layout: Layout
    spare: Slots | None = field(default=None)

    def take(self, batch: int, capacity: int) -> Slots:
        """Return slots for a batch, with exactly this capacity; their rows hold anything.

        Kernels split a sequence by capacity, so that a larger one would give other bits.
        """
        spare, self.spare = self.spare, None
        if spare is not None and (spare.batch, spare.capacity) == (batch, capacity):
            return spare
        del spare  # before more memory is asked for
        return Slots(self.layout, batch, capacity)

    def give_back(self, holder: "list[Slots]") -> None:
        """Keep the slots of a dead cache for the next one."""
        if holder:
            self.spare = holder[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spare": None}
