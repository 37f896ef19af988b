"""Number formats: how a range becomes levels and back, on each device, with gradients.

A format is a module here that implements `Format`, and an entry of `FORMATS`; where it has faster
twins than its definition, `spinlab.formats.twins` names them.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from spinlab.config import TensorQuant
from spinlab.config.checks import choice
from spinlab.config.quant import CALIBRATED
from spinlab.errors import InputError
from spinlab.formats.base import Format, Parameters
from spinlab.formats.coded import FP8, MXFP6E2M3, MXFP6E3M2, MXFP8
from spinlab.formats.integer import IntegerFormat
from spinlab.formats.microscaling import Microscaled
from spinlab.formats.mxfp4 import MXFP4
from spinlab.formats.nvfp4 import NVFP4, CalibratedNVFP4

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

_Make = Callable[[int, bool], Format]


def _by_rules(make: Callable[..., Microscaled], name: str) -> dict[str, _Make]:
    """Name what a format is with each rule for its scales."""
    floor, mse = (partial(make, up_from=up_from) for up_from in (2.0, None))
    return {name: make, f"{name}_floor": floor, f"{name}_mse": mse}


FORMATS: dict[str, _Make] = {
    "integer": IntegerFormat,
    **_by_rules(MXFP4, "mxfp4"),
    "nvfp4": NVFP4,
    "nvfp4_four_over_six": partial(NVFP4, four_over_six=True),
    CALIBRATED: CalibratedNVFP4,
    **_by_rules(MXFP6E2M3, "mxfp6_e2m3"),
    **_by_rules(MXFP6E3M2, "mxfp6_e3m2"),
    **_by_rules(MXFP8, "mxfp8"),
    "fp8": FP8,
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
    for name, make in FORMATS.items():
        with suppress(InputError):  # one that has other bits
            if make(format.bits, format.symmetric) == format:
                return name
    raise KeyError(f"{format} has no name")
