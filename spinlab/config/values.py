"""All settings by their dotted names, and what holds for every value, whatever it means."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from spinlab.errors import InputError

_WIDEST = 2**63  # torch's generators, and JSON's readers, take signed integers of 64 bits


def check_values(settings: dict[str, Any]) -> None:
    """Raise InputError for a number without a finite value, a name that is empty or comes twice."""
    for name, value in nodes(settings):
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


def nodes(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names with their values: of groups and of what is in them, in lists too."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name, value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from nodes(item, f"{name}.")


def values_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the single settings of a tree by their dotted names."""
    return {name: v for name, v in nodes(dict(settings)) if not isinstance(v, dict)}


def text(value: Any) -> str:
    """Return a value as a command line has it, a number with the digits that tell it apart."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{text(item)}' for name, item in value.items())}}}"
    if isinstance(value, float) and float(short := f"{value:.6g}") == value:
        return short
    return str(value)


def words_of(words: Iterable[str]) -> dict[str, str]:
    """Return the values in a command's words (`name=value`, `+name=value`) by their names."""
    split = (word.lstrip("+").partition("=") for word in words)
    return {name: value for name, equals, value in split if equals}
