"""How many bytes of tensors are there at once: counted at every operation, on any device."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Count storages that operations read and make; what is on the meta device takes nothing.

    peak: the most bytes after an operation since the last `begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def begin(self) -> None:
        """Let the peak count from here."""
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if self._is_new(storage):
                    self._there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._there = {at: one for at, one in self._there.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(count for _, count in self._there.values()))
        return out

    def _is_new(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether a storage is not counted yet; one that is gone may have had its place."""
        known = self._there.get(storage._cdata)
        return known is None or known[0].expired()
