"""The memory that is this process's own, and the most of it for a while.

Of resident pages these are the anonymous ones. The others are files' that are mapped, as parts of a
checkpoint are on their way to a device: the system takes such pages back when it needs them. The
kernel keeps no peak of the anonymous ones alone, so they are looked at every few milliseconds.
"""

import re
import threading
from pathlib import Path
from typing import Self

_STATUS = Path("/proc/self/status")
_EVERY = 0.005  # seconds: filling a GiB with numbers takes a hundred times as long


def own_bytes() -> int:
    """Return the bytes of this process's anonymous pages; 0 where the kernel says nothing."""
    told = _STATUS.read_text(encoding="utf-8") if _STATUS.exists() else ""
    found = re.search(r"RssAnon:\s+(\d+) kB", told)
    return int(found[1]) * 1024 if found else 0


class Watch:
    """Look at `own_bytes` while this lasts; `most` is the largest that was seen."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.most = max(self.most, own_bytes())
            if self._over.wait(_EVERY):
                break
