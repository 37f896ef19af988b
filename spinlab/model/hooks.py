"""Hooks on modules for the length of some passes, and what those of decoder layers see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


@contextmanager
def temporary_hooks() -> Iterator[list[RemovableHandle]]:
    """Yield a list for the handles of hooks, and take them off at the end, also after an error."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(output: Any) -> torch.Tensor:
    """Return the activations (batch, length, hidden) among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output
