"""Number formats: how a range becomes levels and back, on each device, with gradients.

A format is a module here that implements `Format`, and an entry of `FORMATS`; where it has faster
twins than its definition, `spinlab.formats.twins` names them.
"""

from collections.abc import Callable

from spinlab.config import TensorQuant
from spinlab.errors import InputError
from spinlab.formats.base import Format, Parameters
from spinlab.formats.integer import IntegerFormat

__all__ = ["FORMATS", "Format", "IntegerFormat", "Parameters", "format_of", "name_of"]

FORMATS: dict[str, Callable[[int, bool], Format]] = {
    "integer": IntegerFormat,
}


def format_of(settings: TensorQuant) -> Format:
    """Return the format that settings name. Raises InputError where there is none of that name."""
    if settings.format not in FORMATS:
        raise InputError(
            f"quant: the format {settings.format!r} is unknown: choose one of {', '.join(FORMATS)}"
        )
    return FORMATS[settings.format](settings.bits, settings.symmetric)


def name_of(format: Format) -> str:
    """Return the name that `FORMATS` has for a format."""
    return next(name for name, kind in FORMATS.items() if type(format) is kind)
