"""What happens to the input of a linear: an online rotation, then a per-token quantizer.

The linears of one group (q, k, v; gate, up) read the very same tensor. They share one InputPath,
which remembers its last result, so that rotating and quantizing happen once per tensor.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from spinlab.formats.integer_numpy import FewLevels
from spinlab.formats.quantizer import Encoded, TokenQuantizer

T = TypeVar("T")
Transform = Callable[[torch.Tensor], torch.Tensor]


class IdentityCache:
    """Do work for the first of several readers of a tensor and hand the result to the others.

    The key is the tensor's identity and version, not its values. Readers may want different work
    done. Nothing is kept beyond the last reader.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._last: tuple[weakref.ref, int, dict[object, object]] | None = None
        self._uses = 0

    def __call__(self, x: torch.Tensor, work: Callable[[torch.Tensor], T]) -> T:
        """Return work(x), or what it gave to a reader before."""
        if self.readers == 1:
            return work(x)
        # of a method only the function: kept with its owner it would keep that alive
        name = getattr(work, "__func__", work)
        results = self._known(x)
        self._uses += 1
        if name not in results:
            results[name] = work(x)
        self._last = (weakref.ref(x), _version(x), results)
        if self._uses == self.readers:
            self._last = None
        return results[name]  # type: ignore[return-value]

    def _known(self, x: torch.Tensor) -> dict[object, object]:
        """Return what was done for x; start anew for another tensor."""
        if self._last is not None:
            source, version, results = self._last
            if source() is x and version == _version(x):
                return results
        self._uses = 0
        return {}


class InputPath(nn.Module):
    """Rotate and quantize the input that `readers` linears share."""

    def __init__(
        self, rotation: Transform | None, quantizer: TokenQuantizer | None, readers: int = 1
    ) -> None:
        super().__init__()
        self.rotation, self.quantizer = rotation, quantizer
        self.once = IdentityCache(readers)

    @property
    def readers(self) -> int:
        return self.once.readers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated input after a round trip through the integer grid: (..., C)."""
        return self.once(x, self._round)

    def encode(self, x: torch.Tensor) -> Encoded:
        """Return the rotated x (..., C) as bytes (..., C/g, g), for integer kernels."""
        return self.once(x, self._encode)

    def encode_few(self, x: torch.Tensor) -> FewLevels:
        """Return what `encode` does for a few numbers in the host's memory, in numpy."""
        return self.once(x, self._encode_few)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.rotation is None else self.rotation(x)
        return x if self.quantizer is None else self.quantizer.round(x)

    def _encode(self, x: torch.Tensor) -> Encoded:
        assert self.quantizer is not None
        return self.quantizer.to_bytes(x if self.rotation is None else self.rotation(x))

    def _encode_few(self, x: torch.Tensor) -> FewLevels:
        assert self.quantizer is not None
        rotation = self.rotation
        return self.quantizer.to_few_bytes(x if rotation is None else rotation(x))


def _version(x: torch.Tensor) -> int:
    """Count in-place changes; inference tensors cannot change and do not count."""
    return 0 if x.is_inference() else x._version
