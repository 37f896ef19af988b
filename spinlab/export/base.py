"""What an export is made of, and what a module needs to be one.

Every field of `spinlab.config.ExportConfig` names a module of this package that writes what the
field's path asks for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.targets import place_of
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.quantized import QuantizedWeight


@dataclass(frozen=True)
class Subject:
    """Hold what is exported; what takes long is made when an export asks for it.

    rotations: all of them, with what was learned along. rotated: a stock model of its own with R1
    and R2 fused and nothing quantized. weights: the rounded weights, by linear.
    """

    rotations: RotationSet
    rotated: Callable[[], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    weights: Callable[[], Mapping[str, QuantizedWeight]]


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
    for field in fields(config.export):
        if path := getattr(config.export, field.name):
            module = import_module(f"spinlab.export.{field.name}")
            yield field.name, path, cast(Export, module)
