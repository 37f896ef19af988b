"""How a layer of the cache keeps keys and values that are coded row by row."""

from collections.abc import Callable

import torch

from spinlab.kv.base import RowCodec

_KEPT = 1 << 18  # decoded numbers that a layer keeps at most


class RowLayer:
    """Keep coded rows: (batch, kv_heads, tokens, row_bytes) uint8, or floats without a codec.

    While they are few, decoded ones are kept beside them, so that a step decodes its own only.
    """

    def __init__(self, key_codec: RowCodec | None, value_codec: RowCodec | None) -> None:
        self.key_codec, self.value_codec = key_codec, value_codec
        self.reset()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code new rows (batch, kv_heads, tokens, head_dim) and return all, decoded."""
        codec = self.key_codec
        if codec is not None and codec == self.value_codec and keys.shape == values.shape:
            both = self._append_both(torch.stack((keys, values)), codec)
            return both[0], both[1]
        self.keys = joined(self.keys, coded(keys, codec))
        self.values = joined(self.values, coded(values, self.value_codec))
        return (
            decoded(self.keys, codec, keys.dtype),
            decoded(self.values, self.value_codec, values.dtype),
        )

    def round(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send rows there and back, without their bytes."""
        return rounded(keys, self.key_codec), rounded(values, self.value_codec)

    def crop(self, tokens: int) -> None:
        """Keep the first tokens, so many."""
        if tokens == 0:
            self.reset()
        elif tokens < self.tokens:
            self._change(lambda rows: rows[..., :tokens, :])

    def reorder(self, sequences: torch.Tensor) -> None:
        """Take these sequences, by index, in this order."""
        self._change(lambda rows: rows.index_select(0, sequences.to(rows.device)))

    def reset(self) -> None:
        """Forget all rows."""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._both: torch.Tensor | None = None  # all rows decoded, keys and values stacked

    @property
    def tokens(self) -> int:
        """Return how many tokens are stored."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def sequences(self) -> int:
        """Return how many sequences they belong to, 0 without tokens."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def bytes(self) -> int:
        """Return the bytes that coded rows take."""
        rows = (t for t in (self.keys, self.values) if t is not None)
        return sum(t.numel() * t.element_size() for t in rows)

    def _append_both(self, new: torch.Tensor, codec: RowCodec) -> torch.Tensor:
        """Code new keys and values, stacked, and return all, decoded.

        Both go together because for a token of decoding calls cost more than their work.
        """
        (keys, values), rounded = codec.encode_and_round(new)
        first = self.keys is None
        self.keys, self.values = joined(self.keys, keys), joined(self.values, values)
        if self._both is not None:
            rounded = torch.cat((self._both, rounded), dim=-2)
        elif not first:
            rounded = codec.decode(torch.stack((self.keys, self.values)), new.dtype)
        self._both = rounded if rounded.numel() <= _KEPT else None
        return rounded

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values, self._both = change(self.keys), change(self.values), None


def joined(rows: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Put new tokens (…, tokens, width) behind those that are there."""
    return new if rows is None else torch.cat([rows, new], dim=-2)


def coded(x: torch.Tensor, codec: RowCodec | None) -> torch.Tensor:
    """Return x (…, tokens, head_dim) as it is stored."""
    return x if codec is None else codec.encode(x)


def decoded(rows: torch.Tensor, codec: RowCodec | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the floats (…, tokens, head_dim) behind what is stored."""
    return rows if codec is None else codec.decode(rows, dtype)


def rounded(x: torch.Tensor, codec: RowCodec | None) -> torch.Tensor:
    """Send x: (..., head_dim) through a codec and back, with the codec's gradient."""
    return x if codec is None else codec.pass_through(x)
