"""Number formats: how a range becomes levels and back, on each device, with gradients.

A format is a module here that implements `Format`, and an entry of `FORMATS`; where it has faster
twins than its definition, `spinlab.formats.twins` names them.
"""

from collections.abc import Callable
from functools import partial

from spinlab.config import TensorQuant
from spinlab.config.checks import choice
from spinlab.errors import InputError
from spinlab.formats.base import Format, Parameters
from spinlab.formats.integer import IntegerFormat
from spinlab.formats.mxfp4 import MXFP4
from spinlab.formats.nvfp4 import NVFP4

__all__ = [
    "FORMATS",
    "MXFP4",
    "NVFP4",
    "Format",
    "IntegerFormat",
    "Parameters",
    "format_of",
    "name_of",
]

FORMATS: dict[str, Callable[[int, bool], Format]] = {
    "integer": IntegerFormat,
    "mxfp4": MXFP4,
    "mxfp4_floor": partial(MXFP4, up_from=2.0),
    "mxfp4_mse": partial(MXFP4, up_from=None),
    "nvfp4": NVFP4,
    "nvfp4_four_over_six": partial(NVFP4, four_over_six=True),
}


def format_of(settings: TensorQuant, place: str = "quant") -> Format:
    """Return the format that settings name. place: what a user calls them, as `quant.weights`.

    Raises InputError where there is none of that name, or where it has other bits or groups.
    """
    name = f"{place}.format"
    choice(name, settings.format, tuple(FORMATS))
    try:
        format = FORMATS[settings.format](settings.bits, settings.symmetric)
    except InputError as error:
        raise InputError(f"{name}={settings.format}: {error}") from error
    if format.group and settings.group_size != format.group:
        raise InputError(
            f"{name}={settings.format} has one scale for {format.group} numbers: "
            f"group_size={format.group}, not {settings.group_size}"
        )
    return format


def name_of(format: Format) -> str:
    """Return the name that `FORMATS` has for a format that it makes."""
    parts = format.bits, format.symmetric
    return next(name for name, make in FORMATS.items() if make(*parts) == format)
