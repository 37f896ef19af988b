"""MXFP4: groups of 32 numbers of E2M1 that share a power of two (OCP Microscaling, 2023)."""

from dataclasses import dataclass
from typing import ClassVar

from spinlab.formats.microscaling import Microscaled
from spinlab.formats.minifloat import GroupFloat


@dataclass(frozen=True)
class MXFP4(Microscaled, GroupFloat):
    """Scale the largest number to 4 to 8; from 7 on it would not be rounded to 6.

    There compressed-tensors doubles the scale, too.
    """

    up_from: float | None = 1.75
    name: ClassVar[str] = "mxfp4"
