"""Time norms whose output is turned in blocks and quantized, against quantizing as many bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from spinlab.bench.operands import QUANTIZER, random_floats
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.errors import ResultError
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.kinds import KINDS
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.producers import reference

WIDTHS, TOKENS = (4096, 14336), 8192
_DUAL, _BLOCKS = 128, 64  # sizes of blocks: of learned_inputs, of learned_blocks
_EPSILON = 1e-5
_CHECKED, _SAME = 16, 0.98  # tokens, share of levels


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
            "quantize": [lambda x=x: operations.quantize(x, QUANTIZER) for x in inputs]
        }
        turns = _turns(width)
        for kind, turn in turns.items():
            _check(operations, turn, inputs[0][:_CHECKED], kind)
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
    return lambda: operations.norm_quantize(x, None, _EPSILON, QUANTIZER, turn)


def _check(operations: Operations, turn: ScaledDual, x: torch.Tensor, kind: str) -> None:
    """Raise ResultError unless some tokens get the definition's levels, but for float noise."""
    found = operations.norm_quantize(x, None, _EPSILON, QUANTIZER, turn).levels
    expected = reference.norm_quantize(x, None, _EPSILON, QUANTIZER, turn).levels
    same = (found == expected).double().mean().item()
    if not same > _SAME:
        raise ResultError(f"only {same:.3%} of the levels of {kind} at {x.shape[1]} are right")
