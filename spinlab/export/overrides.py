"""Overrides of formats that a target can hold, written as a user would type them."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spinlab.config import FormatChange, Override
from spinlab.config.quant import KINDS, Kind

# of an override, by its place in the list: what of its formats is to be another
Changes = Mapping[tuple[int, Kind], Mapping[str, Any]]


def changed(overrides: Sequence[Override], changes: Changes) -> list[Override]:
    """Return the overrides with some of their settings exchanged."""
    return [
        replace(entry, **{k: replace(getattr(entry, k), **changes.get((i, k), {})) for k in KINDS})
        for i, entry in enumerate(overrides)
    ]


def of_weights(overrides: Iterable[Override]) -> list[Override]:
    """Return what the overrides change of weights: inputs keep the format that most have."""
    weights = (entry for entry in overrides if entry.weights.given)
    return [replace(entry, activations=FormatChange()) for entry in weights]


def typed(overrides: Iterable[Override]) -> str:
    """Return the word of a command line that sets these overrides, quoted for a shell."""
    word = f"quant.overrides=[{','.join(map(_entry, overrides))}]"
    return word if word == "quant.overrides=[]" else shlex.quote(word)


def value_typed(value: Any) -> str:
    """Write a value as a command does."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry(entry: Override) -> str:
    """Write an entry in the grammar of settings, in which patterns have to be quoted."""
    pattern = entry.pattern.replace("\\", "\\\\").replace('"', '\\"')
    words = [f'pattern:"{pattern}"']
    for kind in KINDS:
        if given := getattr(entry, kind).given:
            inner = ",".join(f"{name}:{value_typed(value)}" for name, value in given.items())
            words.append(f"{kind}:{{{inner}}}")
    return f"{{{','.join(words)}}}"
