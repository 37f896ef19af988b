"""Time norms whose output is turned in blocks and quantized, against quantizing as many bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from spinlab.bench.operands import QUANTIZER, random_floats
from spinlab.bench.producers import check_levels
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.kinds import KINDS
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.producers import reference

WIDTHS, TOKENS = (4096, 14336), 8192
_DUAL, _BLOCKS = 128, 64  # sizes of blocks: of learned_inputs, of learned_blocks
_EPSILON = 1e-5
_CHECKED = 16  # tokens


def transforms(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], int] = (WIDTHS, TOKENS),
) -> None:
    """Time norm + transform + quantize; cases: widths, tokens.

    `ratio/transform/<width>/<kind>` is its time over that of quantizing the same inputs: two
    rotations around a permutation (`dual`) or one (`blocks`), with factors rounded to bfloat16, or
    `_exact`. The floor reads 16 bits of a number and writes 8, at the rate of a copy.
    """
    generator = torch.Generator(device).manual_seed(4)
    widths, tokens = cases
    for width in widths:
        copies = copies_for(2 * tokens * width, device)
        inputs = [random_floats(tokens, width, generator=generator) for _ in range(copies)]
        works: dict[str, list[Work]] = {
            "quantize": [
                lambda x=x: operations.quantize(x, QUANTIZER, summed=False) for x in inputs
            ]
        }
        turns = _turns(width)
        for kind, turn in turns.items():
            some = inputs[0][:_CHECKED]
            found, expected = (
                made(some, None, _EPSILON, QUANTIZER, turn)
                for made in (operations.norm_quantize, reference.norm_quantize)
            )
            check_levels(found, expected, f"{kind} at {width}")
            works[kind] = [_normed(operations, turn, x) for x in inputs]
        case = f"transform/{width}"
        seconds = results.measure(case, works, device)
        results.add({f"ratio/{case}/{kind}": seconds[kind] / seconds["quantize"] for kind in turns})
        results.add({f"floor/{case}": 3 * tokens * width / rates["copy"]})


def _turns(width: int) -> dict[str, ScaledDual]:
    """Draw the transforms of a width, with a matrix for each block, as learned ones have them."""
    generator = torch.Generator().manual_seed(4)

    def drawn(size: int) -> torch.Tensor:
        blocks = [KINDS["random"](size, generator, "inputs") for _ in range(width // size)]
        return torch.stack(blocks)

    order = torch.randperm(width, generator=generator)
    exact = {
        "dual": ScaledDual(dual=DualTransform(drawn(_DUAL), order, drawn(_DUAL))),
        "blocks": ScaledDual(dual=BlockRotation(drawn(_BLOCKS))),
    }
    rounded = {kind: replace(turn, rounded=True) for kind, turn in exact.items()}
    return rounded | {f"{kind}_exact": turn for kind, turn in exact.items()}


def _normed(operations: Operations, turn: ScaledDual, x: torch.Tensor) -> Work:
    return lambda: operations.norm_quantize(x, None, _EPSILON, QUANTIZER, turn, summed=False)
