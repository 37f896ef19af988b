"""The runtime's cache: slots of fixed places in memory, so that a CUDA graph can write them."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from spinlab.errors import InputError
from spinlab.kv.codec import AffineCodec
from spinlab.runtime.kernels.rows import PackedRows, empty_rows

_STEP = 256  # a cache that must grow, or whose need is not known, has a multiple of this
_BLOCK = 64  # slots that kernels take at once


@dataclass(frozen=True)
class PlainRows:
    """Hold keys or values (batch, kv_heads, capacity, width): floats, or bytes of any codec."""

    data: torch.Tensor
    codec: AffineCodec | None
    dtype: torch.dtype

    def write(self, x: torch.Tensor, position: torch.Tensor) -> None:
        """Store x: (batch, kv_heads, tokens, head_dim) from slot `position` (1,) on."""
        index = position + torch.arange(x.shape[2], device=position.device)
        self.data.index_copy_(2, index, x if self.codec is None else self.codec.encode(x))

    def read(self, length: int) -> torch.Tensor:
        """Return the first rows as floats: (batch, kv_heads, length, head_dim)."""
        rows = self.data[:, :, :length]
        return rows if self.codec is None else self.codec.decode(rows, self.dtype)


Rows = PackedRows | PlainRows


def fits_packed_rows(codec: AffineCodec) -> bool:
    """Tell whether kernels read what a codec makes: one group of nibbles per head."""
    return codec.grid.bits <= 4 and codec.groups == 1 and codec.width % 4 == 0


@dataclass(frozen=True)
class Layout:
    """Say what a model keeps of a token: heads and their width, and a codec each (None = floats).

    packed: rows lie as kernels read them; otherwise torch codes and decodes them
    window: how far back a token may look, or None
    """

    layers: int
    kv_heads: int
    head_dim: int
    keys: AffineCodec | None
    values: AffineCodec | None
    packed: bool
    window: int | None
    dtype: torch.dtype
    device: torch.device

    def rows(self, codec: AffineCodec | None, batch: int, capacity: int) -> Rows:
        """Return empty rows of one layer."""
        if self.packed:
            assert codec is not None
            return empty_rows(batch, self.kv_heads, capacity, codec, self.device)
        width, dtype = self.head_dim, self.dtype
        if codec is not None:
            width, dtype = codec.row_bytes, torch.uint8
        shape = (batch, self.kv_heads, capacity, width)
        return PlainRows(torch.zeros(shape, dtype=dtype, device=self.device), codec, self.dtype)


class Slots:
    """Hold the memory of one cache, and the CUDA graph that was captured on it.

    start     (batch,) int32: first valid slot of a sequence, behind its padding
    position  (1,) int64: slot of the first token of this pass
    length    (1,) int64: slots in use, those of this pass counted
    """

    def __init__(self, layout: Layout, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.graph: object | None = None
        # tensors made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            both = [(layout.keys, layout.values)] * layout.layers
            self.rows = [tuple(layout.rows(c, batch, capacity) for c in pair) for pair in both]
            self.start = torch.zeros(batch, dtype=torch.int32, device=layout.device)
            self.position = torch.zeros(1, dtype=torch.int64, device=layout.device)
            self.length = torch.zeros(1, dtype=torch.int64, device=layout.device)

    def tensors(self) -> list[torch.Tensor]:
        """Return what is stored per slot; slots are dimension 2."""
        found: list[torch.Tensor | None] = []
        for rows in (r for pair in self.rows for r in pair):
            parts = (rows.packed, rows.scale, rows.zero) if isinstance(rows, PackedRows) else None
            found += [rows.data] if isinstance(rows, PlainRows) else parts or ()
        return [t for t in found if t is not None]


@dataclass
class SlotPool:
    """Make slots, and keep those of the last cache that died: with them lives their graph.

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


class IntegerCache(Cache):
    """Keep keys and values of all layers; the runtime's attention writes and reads its slots.

    Memory is taken by the first pass, which knows the batch. A capacity that runs out grows, at the
    cost of a copy and a new CUDA graph.
    """

    def __init__(self, pool: SlotPool, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.pool, self.wanted = pool, capacity
        self.filled, self.tokens = 0, 0  # slots of past passes, and of this one
        self.padded = False
        self.all_padding = False  # in some sequence: a later mask says where it begins
        self._mask: torch.Tensor | None = None
        self._slots: list[Slots] = []
        weakref.finalize(self, pool.give_back, self._slots).atexit = False

    @property
    def slots(self) -> Slots:
        return self._slots[0]

    @property
    def is_empty(self) -> bool:
        return not self._slots

    def begin(self, batch: int, tokens: int, mask: torch.Tensor | None) -> None:
        """Make room for the tokens of a pass; mask: (batch, filled + tokens), 0 at padding.

        Without a mask sequences begin where an earlier pass found their first token.
        """
        if self.tokens:  # the last pass broke off
            self.rewind(self.filled)
        needed = self.filled + tokens
        if mask is not None and tuple(mask.shape) != (batch, needed):
            raise InputError(
                f"an attention mask of shape {tuple(mask.shape)} meets {batch} sequences of "
                f"{needed} tokens: the integer runtime takes masks (batch, tokens) of all tokens, "
                "those in the cache included"
            )
        self.check_window(needed)
        self._reserve(batch, needed)
        self.tokens, self._mask = tokens, None
        if self.filled == 0:
            self.slots.length.zero_()
        if self.filled == 0 or mask is not None:
            self._set_padding(mask)
        self.slots.position.copy_(self.slots.length)
        self.slots.length.add_(tokens)

    def must_read(self, mask: torch.Tensor | None) -> bool:
        """Tell whether the mask of one more token may say what no earlier mask said.

        Padding stands at the left: where every sequence has begun, a mask says nothing new.
        """
        if mask is None:
            return False
        return self.all_padding or tuple(mask.shape) != (self.slots.batch, self.filled + 1)

    def check_window(self, needed: int) -> None:
        """Raise InputError where so many tokens reach beyond a sliding window."""
        window = self.pool.layout.window
        if window is not None and needed > window:
            raise InputError(
                f"{needed} tokens exceed the model's sliding window of {window}, which the integer "
                "runtime lacks: shorten the input or use runtime.backend=reference"
            )

    @property
    def visible(self) -> int:
        """How many slots a pass reads as floats: one token reads all, at fixed sizes."""
        return self.slots.capacity if self.tokens == 1 else self.filled + self.tokens

    def mask(self) -> torch.Tensor | None:
        """Return the slots that tokens of this pass may see: (batch, 1, tokens, visible) bool.

        None stands for a causal pass from an empty cache without padding. A padding token sees
        itself, so that it stays finite.
        """
        if self.filled == 0 and self.tokens > 1 and not self.padded:
            return None
        if self._mask is None:
            device = self.slots.position.device
            column = torch.arange(self.visible, device=device)
            row = (self.slots.position + torch.arange(self.tokens, device=device))[:, None]
            valid = (column >= self.slots.start[:, None, None]) | (column == row)
            self._mask = (valid & (column <= row))[:, None]
        return self._mask

    def end(self) -> None:
        """Count the tokens of a pass as past."""
        self.filled, self.tokens, self._mask = self.filled + self.tokens, 0, None

    def rewind(self, filled: int) -> None:
        """Forget all tokens from a slot on."""
        self.filled, self.tokens = filled, 0
        if not self.is_empty:
            self.slots.length.fill_(filled)

    def _reserve(self, batch: int, needed: int) -> None:
        if self.is_empty:
            capacity = _up(self.wanted, _BLOCK) if self.wanted >= needed else _up(needed, _STEP)
            self._slots.append(self.pool.take(batch, capacity))
            return
        if batch != self.slots.batch:
            raise InputError(f"a batch of {batch} meets a cache of {self.slots.batch} sequences")
        if needed > self.slots.capacity:
            old = self._slots.pop()
            self._slots.append(Slots(self.pool.layout, batch, _up(2 * needed, _STEP)))
            for source, target in zip(old.tensors(), self.slots.tensors(), strict=True):
                target[:, :, : self.filled].copy_(source[:, :, : self.filled])
            self.slots.start.copy_(old.start)
            self.slots.length.copy_(old.length)

    def _set_padding(self, mask: torch.Tensor | None) -> None:
        if mask is None or bool(mask.all()):
            self.padded = self.all_padding = False
            self.slots.start.zero_()
            return
        mask = mask.bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise InputError(
                "the attention mask has zeros after ones: the integer runtime takes padding on the "
                "left only (tokenizer.padding_side='left')"
            )
        self.padded, self.all_padding = True, not bool(mask[:, -1].all())
        self.slots.start.copy_((~mask).sum(1))

    # what transformers asks of a cache ----------------------------------------------------------

    def __len__(self) -> int:
        return self.pool.layout.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.filled

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # it grows

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.rewind(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self.rewind(self.filled - tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give every sequence the past of another one, for beam search."""
        for tensor in (*self.slots.tensors(), self.slots.start):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def stored_bytes(self) -> int:
        """Return the bytes that all slots take, used or not."""
        if self.is_empty:
            return 0
        return sum(t.numel() * t.element_size() for t in self.slots.tensors())


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
