"""Which operations of a format have a fast twin on a device: one table, and nothing else to ask.

A twin gives the values of the definition, which `TokenQuantizer` and `spinlab.formats.gradient`
make of a format's own functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from spinlab.formats import float_triton, integer_numpy, integer_triton
from spinlab.formats.base import Format
from spinlab.formats.coded import FP8, MXFP6E2M3, MXFP6E3M2, MXFP8
from spinlab.formats.integer import IntegerFormat
from spinlab.formats.mxfp4 import MXFP4
from spinlab.formats.nvfp4 import NVFP4, CalibratedNVFP4


@dataclass(frozen=True)
class Twin:
    """Hold fast operations, None where there is only the definition. Arguments: see the twins.

    Those that round and encode are told the `peak` of a quantizer, too, if it has one and the
    format is `of_tensor`.
    """

    takes: Callable[[torch.Tensor], bool]
    round_rows: Callable[..., torch.Tensor] | None = None
    encode_rows: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    pull_back_rows: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    few_levels: Callable[..., Any] | None = None


_DEFINITION = Twin(lambda x: True)
_FLOATS = Twin(
    integer_triton.has_kernel,
    round_rows=float_triton.round_rows,
    pull_back_rows=float_triton.pull_back_rows,
)
_FOUR_BITS = replace(_FLOATS, encode_rows=float_triton.encode_rows)

TWINS: Mapping[tuple[type, str], Twin] = {
    (IntegerFormat, "cpu"): Twin(
        integer_numpy.are_few,
        round_rows=integer_numpy.round_rows,
        few_levels=integer_numpy.few_levels,
    ),
    (IntegerFormat, "cuda"): Twin(
        integer_triton.has_kernel,
        round_rows=integer_triton.round_rows,
        encode_rows=integer_triton.encode_rows,
        pull_back_rows=integer_triton.pull_back_rows,
    ),
    **{(kind, "cuda"): _FOUR_BITS for kind in (MXFP4, NVFP4, CalibratedNVFP4)},
    **{(kind, "cuda"): _FLOATS for kind in (MXFP6E2M3, MXFP6E3M2, MXFP8, FP8)},
}


def twin_of(format: Format, x: torch.Tensor) -> Twin:
    """Return what is fast for a format and numbers such as x."""
    twin = TWINS.get((type(format), x.device.type), _DEFINITION)
    return twin if twin.takes(x) else _DEFINITION
