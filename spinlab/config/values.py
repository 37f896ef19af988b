"""What holds for every value of the settings, whatever it means."""

import math
from collections.abc import Iterator
from typing import Any

from spinlab.errors import InputError

_WIDEST = 2**63  # torch's generators, and JSON's readers, take signed integers of 64 bits


def check_values(settings: dict[str, Any]) -> None:
    """Raise InputError for a number without a finite value, a name that is empty or comes twice."""
    for name, value in _leaves(settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value} is no finite number: give one")
        if isinstance(value, int) and not -_WIDEST <= value < _WIDEST:
            raise InputError(f"{name}={value} does not fit into 64 bits: give a smaller number")
        if value == "":
            raise InputError(f"{name} is empty: give a value, or null to leave it out")
        if isinstance(value, list):
            _check_names(name, [item for item in value if isinstance(item, str)])


def _check_names(name: str, items: list[str]) -> None:
    for item in items:
        if not item.strip():
            raise InputError(f"{name} holds an empty name: leave it out")
        if items.count(item) > 1:
            raise InputError(f"{name} names {item} twice: once is enough")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of all values, lists whole and what dictionaries in them hold."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        for item in inner:
            if isinstance(item, dict):
                yield from _leaves(item, f"{name}.")
        if not isinstance(value, dict):
            yield name, value
