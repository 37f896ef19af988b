"""The fused runtime's cache, as transformers knows caches; its memory is that of `slots`."""

import weakref

import torch
from transformers.cache_utils import Cache

from spinlab.errors import InputError
from spinlab.kv.bias import WavesAt
from spinlab.runtime.fused.slots import SlotPool, Slots

_STEP = 256  # a cache that must grow, or whose need is not known, has a multiple of this
_BLOCK = 64  # slots that kernels take at once


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
        self.waves: torch.Tensor | None = None  # RoPE's, of all that this pass sees
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

    def before_replay(self, batch: int, tokens: int) -> None:
        """Make ready for a pass that a graph runs; a first one has no padding."""
        if self.tokens:  # the last pass broke off
            self.rewind(self.filled)
        self.check_window(self.filled + tokens)
        self._reserve(batch, self.filled + tokens)
        if self.filled == 0:
            self.padded = self.all_padding = False

    def must_read(self, mask: torch.Tensor | None) -> bool:
        """Tell whether a mask (batch, tokens) of one more token may say what no earlier did.

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
                "runtime lacks: shorten the input or use runtime.backend=torch"
            )

    @property
    def visible(self) -> int:
        """How many slots a pass reads as floats: one token reads all, at fixed sizes."""
        return self.slots.capacity if self.tokens == 1 else self.filled + self.tokens

    @property
    def is_causal(self) -> bool:
        """Whether this is a pass of several tokens from an empty cache, without padding."""
        return self.filled == 0 and self.tokens > 1 and not self.padded

    def mask(self) -> torch.Tensor | None:
        """Return the slots that tokens of this pass may see: (batch, 1, tokens, visible) bool.

        None stands for a causal pass from an empty cache without padding. A padding token sees
        itself, so that it stays finite.
        """
        if self.is_causal:
            return None
        if self._mask is None:
            device = self.slots.position.device
            column = torch.arange(self.visible, device=device)
            row = (self.slots.position + torch.arange(self.tokens, device=device))[:, None]
            valid = (column >= self.slots.start[:, None, None]) | (column == row)
            self._mask = (valid & (column <= row))[:, None]
        return self._mask

    def turned(self, positions: torch.Tensor, waves_at: WavesAt) -> None:
        """Take the positions of this pass's tokens: (batch or 1, tokens)."""
        kept = self.slots.positions
        assert kept is not None, "only a layout that keeps positions asks for them"
        slots = self.slots.position + torch.arange(self.tokens, device=kept.device)
        new = positions.to(torch.int32).expand(len(kept), -1)
        kept.index_copy_(2, slots, new[:, None])
        self.waves = waves_at(kept[:, 0, : self.visible])

    def end(self) -> None:
        """Count the tokens of a pass as past."""
        self.filled, self.tokens, self._mask = self.filled + self.tokens, 0, None
        self.waves = None

    def rewind(self, filled: int) -> None:
        """Forget all tokens from a slot on."""
        if not self.is_empty:
            self.slots.rewind(self.filled + self.tokens, filled)
        self.filled, self.tokens = filled, 0

    def _reserve(self, batch: int, needed: int) -> None:
        if self.is_empty:
            capacity = _up(self.wanted, _BLOCK) if self.wanted >= needed else _up(needed, _STEP)
            self._slots.append(self.pool.take(batch, capacity))
            return
        if batch != self.slots.batch:
            raise InputError(f"a batch of {batch} meets a cache of {self.slots.batch} sequences")
        if needed > self.slots.capacity:
            self._move(Slots(self.pool.layout, batch, _up(2 * needed, _STEP)))

    def _move(self, slots: Slots, sequences: torch.Tensor | slice = slice(None)) -> None:
        """Go on in other slots with the past of some sequences."""
        old = self._slots.pop()
        for source, target in zip(old.tensors(), slots.tensors(), strict=True):
            target[:, :, : self.filled].copy_(source[sequences, :, : self.filled])
        for source, target in zip(old.kept(), slots.kept(), strict=True):
            target.copy_(source[sequences])
        slots.start.copy_(old.start[sequences])
        slots.length.copy_(old.length)
        self._slots.append(slots)

    def _set_padding(self, mask: torch.Tensor | None) -> None:
        if mask is None or bool(mask.all()):
            self.padded = self.all_padding = False
            self._begin_at(torch.zeros_like(self.slots.start))
            return
        mask = mask.bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise InputError(
                "the attention mask has zeros after ones: the integer runtime takes padding on the "
                "left only (tokenizer.padding_side='left')"
            )
        self.padded, self.all_padding = True, not bool(mask[:, -1].all())
        self._begin_at((~mask).sum(1))

    def _begin_at(self, start: torch.Tensor) -> None:
        """Take where sequences begin; sinks in floats are those of before."""
        if self.filled and any(floats.sinks for floats in self.slots.floats.values()):
            begun = self.slots.start < self.filled
            if bool((begun & (self.slots.start != start)).any()):
                raise InputError(
                    "the attention mask moves the first tokens of sequences, which kv.sinks keeps "
                    "in floats: let it say of earlier tokens what it said in their passes"
                )
        self.slots.start.copy_(start)

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
        """Forget the last tokens, whose number is given as a negative one."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): -n removes the last n tokens of a cache")
        self.rewind(max(self.filled + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give every sequence the past of another one, for beam search."""
        for tensor in (*self.slots.tensors(), *self.slots.kept(), self.slots.start):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if not self.is_empty:
            self.batch_select_indices(torch.arange(self.slots.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences, in this order."""
        if not self.is_empty:
            device = self.slots.start.device
            kept = torch.arange(self.slots.batch, device=device)[indices.to(device)]
            self._move(Slots(self.pool.layout, len(kept), self.slots.capacity), kept)

    def stored_bytes(self) -> int:
        """Return the bytes that all slots take, used or not."""
        if self.is_empty:
            return 0
        stored = *self.slots.tensors(), *self.slots.kept()
        return sum(t.numel() * t.element_size() for t in stored)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
