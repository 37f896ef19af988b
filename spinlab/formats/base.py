"""What a number format is: how the numbers of a range become levels and back.

A format is a frozen dataclass made of `bits` and `symmetric`; one that cannot be had with some of
them raises InputError when it is made. `spinlab.formats.FORMATS` gives formats their names in
settings and files. Ranges come from elsewhere: from the numbers themselves, shrunk by a ratio that
is given, searched (`clip`) or learned (`gradient`).
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol

import torch

from spinlab.formats.pack import pack_levels, unpack_levels

Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Parameters(NamedTuple):
    """Hold what makes numbers of levels: a scale > 0, and an integer-valued zero point.

    Both broadcast against the numbers. A format without zero points has zeros there.
    """

    scale: torch.Tensor
    zero: torch.Tensor


class Pulled(NamedTuple):
    """Hold the gradients of numbers that were rounded, and of the ends of their ranges."""

    x: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


class Format(Protocol):
    """Turn numbers into levels of `bits` bits, integers from `lowest` on, and back."""

    bits: int
    symmetric: bool  # no zero points are stored
    name: ClassVar[str] = ""  # of what files hold, which may have been scaled by several rules
    group: ClassVar[int] = 0  # how many numbers share a scale, where the format itself says that
    of_tensor: ClassVar[bool] = False  # scales of groups depend on the range of the whole tensor
    calibrated: ClassVar[bool] = False  # that range is found beforehand, and is one for all tokens

    @property
    def lowest(self) -> int: ...

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def is_int8(self) -> bool:
        """Tell whether numbers are scale·(level - zero) with levels that fit into a byte.

        Such levels are what integer kernels multiply; others are multiplied as floats.
        """
        return False

    @property
    def is_int4(self) -> bool:
        """Tell the same of half a byte."""
        return False

    @property
    def homogeneous(self) -> bool:
        """Tell whether a multiple of numbers rounds to that multiple: scales come in no steps."""
        return False

    def parameters(self, lowest: torch.Tensor, highest: torch.Tensor) -> Parameters:
        """Return what codes numbers from lowest to highest, both of any one shape.

        0 is added to the range, and is coded exactly.
        """
        ...

    def choose(
        self,
        x: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        peak: torch.Tensor | None,
    ) -> Parameters:
        """Return what codes x: (..., g) in ranges lowest..highest: (..., 1), as `parameters` does.

        peak: what `peak_of` found for the tensor that x is of; None where that is not known.
        """
        return self.parameters(lowest, highest)

    def encode(self, x: torch.Tensor, parameters: Parameters, rounding: Rounding) -> torch.Tensor:
        """Return the levels of x, integer-valued and in its dtype; what lies outside is clipped.

        rounding: `nearest` or `settled` of `spinlab.formats.integer`; (x, scale) to x/scale,
        rounded.
        """
        ...

    def decode(self, levels: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Return the numbers (..., C/g, g) that levels (..., C/g, g) stand for."""
        ...

    def pull_back(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor,
        lowest: torch.Tensor,
        highest: torch.Tensor,
        rounding: Rounding,
    ) -> Pulled:
        """Turn the gradient of rounded numbers into that of x and of the ends of its ranges.

        x, gradient: (..., g); lowest, highest: (..., 1), with 0 added as in `parameters`. As in LSQ
        (Esser et al. 2020) rounding is the identity inside a range, where numbers feel the scale by
        their rounding error; outside they move with the end that they are clipped to.
        """
        ...

    def bounds(self, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return numbers outside of which every range within this one clips."""
        ...

    def centred(
        self, ratio: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor
    ) -> torch.Tensor:
        """Return clip ratios, 1 at most, that have the same scales as these of whole ranges.

        Where scales are rounded, a search that takes the largest of equal ratios ends at the edge
        of a step. These are in the middle of it, or 1 where the whole range lies below that.
        """
        return ratio

    def pack(self, levels: torch.Tensor) -> torch.Tensor:
        """Return (..., n) levels as they are stored: (..., bytes) uint8."""
        return pack_levels(levels, self.bits, self.lowest)

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        """Return the (..., n) levels behind stored bytes, as integers."""
        return unpack_levels(packed, self.bits, n, self.lowest)

    def store_scale(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return scales (out, in/g), float32, as they are stored: `scale`, and what it needs."""
        return {"scale": scale}

    def load_scale(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scales (out, in/g), float32, behind what `store_scale` returned."""
        return stored["scale"]


def magnitude(lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Return the larger of |lowest| and |highest|, where the range holds 0."""
    return torch.maximum(highest, -lowest).clamp(min=0)


def peak_of(
    format: Format, lowest: torch.Tensor, highest: torch.Tensor, dims: tuple[int, ...]
) -> torch.Tensor | None:
    """Return the largest magnitude of the ranges of each tensor, which extend over some dimensions.

    These are kept, with size 1. None for a format that does not ask for it.
    """
    return magnitude(lowest, highest).amax(dims, keepdim=True) if format.of_tensor else None
