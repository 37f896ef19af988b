"""Tokens of one layer that stay in floats: sinks and the newest, in memory of a fixed size.

Which token a place holds follows from how many there are, so that kernels and CUDA graphs need
nothing from the host.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FloatTokens:
    """Hold keys, turned as the codec meets them, and values of first and newest tokens.

    keys, values: (batch, kv_heads, sinks + window, head_dim). Place i < sinks is of a sequence's
    token i, place sinks + r of the newest token whose slot is r modulo the window. Sinks stand in
    the window, too, and are read from their own places alone.
    start: (batch,) int32, the slots that sequences begin at.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    sinks: int

    @property
    def window(self) -> int:
        return self.keys.shape[2] - self.sinks

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values]

    def write(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        """Store new tokens (batch, kv_heads, tokens, head_dim) from slot `position` (1,) on."""
        tokens = keys.shape[2]
        tail = min(tokens, self.window)  # those before it would be overwritten at once
        late = torch.arange(tokens - tail, tokens, device=keys.device)
        nth = self.sink_slots() - position
        new = ((nth >= 0) & (nth < tokens))[:, None, :, None]
        nth = nth.clamp(0, tokens - 1)[:, None, :, None]
        for kept, x in zip(self.tensors, (keys, values), strict=True):
            x = x.detach()  # a store is no part of a graph of gradients
            if tail:
                kept.index_copy_(2, self._ring(position + late), x[:, :, tokens - tail :])
            first = kept[:, :, : self.sinks]
            first.copy_(torch.where(new, x.gather(2, nth.expand_as(first)), first))

    def read(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of slots begin..end-1, which the window holds."""
        slots = torch.arange(begin, end, device=self.keys.device)
        keys, values = (kept.index_select(2, self._ring(slots)) for kept in self.tensors)
        return keys, values

    def restore(self, keys: torch.Tensor, values: torch.Tensor, begin: int) -> None:
        """Put tokens back into the window, from slot `begin` on."""
        slots = torch.arange(begin, begin + keys.shape[2], device=keys.device)
        for kept, x in zip(self.tensors, (keys, values), strict=True):
            kept.index_copy_(2, self._ring(slots), x)

    def sink_slots(self) -> torch.Tensor:
        """Return the slots of the sinks: (batch, sinks)."""
        return self.start[:, None] + torch.arange(self.sinks, device=self.start.device)

    def newest_slots(self, length: torch.Tensor) -> torch.Tensor:
        """Return the slots in the window of `length` (1,) tokens: (window,), negative for none."""
        place = torch.arange(self.window, device=length.device)
        return length - 1 - (length - 1 - place) % self.window if self.window else place

    def slots(self, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slot of every place, and whether a token is read there: (batch, places).

        length: (1,), the slots in use.
        """
        first = self.sink_slots()
        newest = self.newest_slots(length).expand(len(first), -1)
        behind_sinks = newest >= self.start[:, None] + self.sinks
        return torch.cat((first, newest), 1), torch.cat((first < length, behind_sinks), 1)

    def _ring(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the places of slots in the window."""
        return self.sinks + slots % self.window if self.window else slots


def empty_tokens(
    shape: tuple[int, int, int], kept: tuple[int, int], start: torch.Tensor, dtype: torch.dtype
) -> FloatTokens:
    """Return zeros for (batch, kv_heads, head_dim) numbers a token; kept: sinks, window."""
    batch, kv_heads, width = shape
    keys, values = torch.zeros(
        2, batch, kv_heads, sum(kept), width, dtype=dtype, device=start.device
    )
    return FloatTokens(keys, values, start, kept[0])
