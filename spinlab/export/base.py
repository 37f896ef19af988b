"""What an export is made of, and what a module needs to be one.

Every target of `spinlab.config.ExportConfig` is a module of this package that writes what is asked
for there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.targets import place_of
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Subject:
    """Hold what is exported; what takes long is made when an export asks for it.

    rotations: all of them, with what was learned along. record: of the run, ready for JSON, and
    its model's license, of which the hub may be asked. Each model is one of its own, in the run's
    dtype and without modules of spinlab's: the `original`; `rotated` has R1 and R2 fused and
    nothing quantized; `fused` has everything fused that is not online, but for the rounded weights
    that it is given. weights: the rounded ones, by linear. dtype: of 16 bits, which the original
    declares, for files in 16 bits. in_parts: gives `fused` as parts with a layer each, the ends
    last, and `original` is then its ends, where the whole would be too much.
    """

    config: Config
    rotations: RotationSet
    record: Callable[[], Mapping[str, Any]]
    original: Callable[[], PreTrainedModel]
    rotated: Callable[[], PreTrainedModel]
    fused: Callable[[Mapping[str, QuantizedWeight]], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    weights: Callable[[], Mapping[str, QuantizedWeight]]
    dtype: Callable[[], torch.dtype]
    in_parts: Callable[[Mapping[str, QuantizedWeight]], Iterator[PreTrainedModel]] | None = None

    def fused_parts(self, weights: Mapping[str, QuantizedWeight]) -> Iterator[PreTrainedModel]:
        """Yield the parts of the fused model, or all of it."""
        if self.in_parts is not None:
            yield from self.in_parts(weights)
        else:
            yield self.fused(weights)


class Export(Protocol):
    """A module that exports."""

    def check(self, setting: str, target: Path, config: Config) -> None:
        """Raise InputError, before any work is done, for what could not be written.

        setting: as the user wrote it. target: the place that it names, behind `~` and links.
        """

    def write(self, subject: Subject, path: str) -> None:
        """Write to a path of the settings, at once and whole."""


def check_exports(config: Config) -> None:
    """Raise InputError, before any work is done, for an export that could not be written."""
    _check_apart(config)
    for name, path, export in _asked_for(config):
        setting = f"export.{name}={path}"
        try:
            export.check(setting, place_of(path), config)
        except OSError as error:
            raise InputError(f"{setting} cannot be written: {error.strerror}") from error


def write_exports(config: Config, subject: Subject) -> None:
    """Write everything that the settings ask for."""
    for _, path, export in _asked_for(config):
        export.write(subject, path)


def _asked_for(config: Config) -> Iterator[tuple[str, str, Export]]:
    for name, path in config.export.targets.items():
        yield name, path, cast(Export, import_module(f"spinlab.export.{name}"))


def _check_apart(config: Config) -> None:
    """Raise InputError where one export lies in the place of another, or below it."""
    places = {name: place_of(path) for name, path in config.export.targets.items()}
    for (one, outer), (other, inner) in permutations(places.items(), 2):
        if inner.is_relative_to(outer):
            paths = config.export.targets
            raise InputError(
                f"export.{other}={paths[other]} lies in export.{one}={paths[one]}: name another "
                "place"
            )
