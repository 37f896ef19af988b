"""Numbers that are none: a result with one among them fails a run instead of entering a record."""

import math
from collections.abc import Mapping

import torch

from spinlab.errors import ResultError


def check_finite(values: Mapping[str, float | torch.Tensor], what: str) -> None:
    """Raise ResultError naming the first of these numbers or tensors that is not finite.

    what: begins the sentence, and tells whose numbers they are.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            wrong = int((~torch.isfinite(value)).sum())
            found = f"has {wrong} of {value.numel()} numbers that are nan or infinite"
        else:
            wrong, found = not math.isfinite(value), f"is {value}"
        if wrong:
            raise ResultError(f"{what}: {name} {found}")
