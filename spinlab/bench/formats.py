"""Time how inputs are rounded to number formats, and their gradients, against memory traffic."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from spinlab.bench.operands import random_floats
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.errors import ResultError
from spinlab.formats import FORMATS
from spinlab.formats.gradient import pull_back
from spinlab.formats.integer import settled
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.formats.twins import twin_of
from spinlab.runtime.fused.operations import Operations

WIDTHS, TOKENS = (576, 4096, 14336), 8192  # a row's tail, a power of two, many pieces
# by name, each as experiments have it, with its bits
TIMED = {
    "integer": 4, "nvfp4": 4, "nvfp4_four_over_six": 4, "nvfp4_calibrated": 4, "mxfp4": 4,
    "mxfp4_mse": 4, "mxfp6_e2m3": 6, "mxfp8": 8, "fp8": 8,
}  # fmt: skip
_PEAK = 6.0  # of an input that was calibrated on
_RATIO = 0.9
# bytes that a number takes there and back: in bfloat16, as a level, with its gradient twice; and
# those of the scale and the zero point of a group
_BYTES = {"round": 4, "encode": 3, "pull_back": 6}
_OF_GROUP = {"encode": 8}


def formats(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], int, Sequence[str]] = (WIDTHS, TOKENS, tuple(TIMED)),
) -> None:
    """Time a round trip, levels and gradients of bf16; cases: widths, tokens, names of formats.

    `over_floor/…` are times over what reading and writing once takes at the rate of a copy. The
    definition, in torch, is timed beside them.
    """
    generator = torch.Generator(device).manual_seed(5)
    widths, tokens, names = cases
    for width in widths:
        copies = copies_for(4 * tokens * width, device)  # of numbers and their gradients
        xs, gradients = (
            [random_floats(tokens, width, generator=generator) for _ in range(copies)]
            for _ in range(2)
        )
        for name in names:
            quantizer = _quantizer(name)
            _check(quantizer, xs[0])
            case = f"formats/{name}/{width}"
            seconds = results.measure(case, _works(quantizer, xs, gradients), device)
            for work in _BYTES.keys() & seconds.keys():
                of_group = _OF_GROUP.get(work, 0) / (quantizer.group_size or width)
                floor = (_BYTES[work] + of_group) * tokens * width / rates["copy"]
                results.add({f"floor/{case}/{work}": floor})
                results.add({f"over_floor/{case}/{work}": seconds[work] / floor})


def _quantizer(name: str) -> TokenQuantizer:
    bits = TIMED[name]
    format = FORMATS[name](bits, name != "integer")
    return TokenQuantizer(format, format.group, peak=_PEAK if format.calibrated else None)


def _check(quantizer: TokenQuantizer, x: torch.Tensor) -> None:
    """Raise ResultError unless some tokens have the bits of the definition on a CPU."""
    rows = x[:16]
    wanted = quantizer.decode(quantizer.encode(rows.cpu())).to(x.dtype)
    if not torch.equal(quantizer.round_trip(rows).cpu(), wanted):
        raise ResultError(f"{quantizer.format} is not rounded as by its definition")


def _works(
    quantizer: TokenQuantizer, xs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> dict[str, list[Work]]:
    """Return what is timed on each of some inputs and gradients (tokens, width), by name."""
    works: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "round": lambda x, _: quantizer.round_trip(x),
        "definition": lambda x, _: quantizer.decode(quantizer.encode(x)).to(x.dtype),
        "pull_back": _gradient(quantizer, xs[0]),
    }
    if quantizer.format.is_int8:
        works["encode"] = lambda x, _: quantizer.to_bytes(x)
    return {
        name: [partial(work, *pair) for pair in zip(xs, gradients, strict=True)]
        for name, work in works.items()
    }


def _gradient(
    quantizer: TokenQuantizer, x: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """Return what pulls a gradient back to numbers such as x, as learned ranges do."""
    ratio = torch.tensor(_RATIO, device=x.device)
    format, group = quantizer.format, quantizer.group_size
    if fast := twin_of(format, x).pull_back_rows:
        return lambda x, gradient: fast(x, gradient, ratio, format, group)
    return lambda x, gradient: pull_back(x, gradient, ratio, format, group, settled)
