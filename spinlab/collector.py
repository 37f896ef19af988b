"""Python's garbage collector, kept away from loaded modules.

They stay as long as the process and are most of what there is to walk: with torch and transformers
one walk takes longer than many a stage, and loading them would start several.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def resting() -> Iterator[None]:
    """Start no collection inside the context, where modules are loaded."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cache
def leave_modules() -> None:
    """Leave what there is at the first call, before any network is made, out of collections."""
    gc.collect()
    gc.freeze()
