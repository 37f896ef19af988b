"""Time the fused kernels that make quantized inputs against torch's gate on bf16."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from spinlab.bench.operands import QUANTIZER, random_floats
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.errors import ResultError
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.formats import TokenLevels
from spinlab.runtime.kernels.producers import reference

WIDTHS, TOKENS = (11008, 14336), 8192
_SAME = 0.98  # share of levels


def producers(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], int] = (WIDTHS, TOKENS),
) -> None:
    """Time silu·up + R4 + quantize against bf16 silu·up; cases: widths, tokens."""
    generator = torch.Generator(device).manual_seed(3)
    fused = torch.compile(_gated, dynamic=False) if device.type == "cuda" else _gated
    widths, tokens = cases
    for width in widths:
        rotation = hadamard_rotation(width)
        copies = copies_for(4 * tokens * width, device)
        # columns of one product, as the network has them
        pairs = [
            random_floats(tokens, 2 * width, generator=generator).chunk(2, dim=1)
            for _ in range(copies)
        ]
        apart = [
            [x.contiguous() for x in pair] for pair in pairs
        ]  # two products, as stock has them
        _check(operations, rotation, *pairs[0])
        works = {
            "ours": [_gate(operations, rotation, *pair) for pair in pairs],
            "eager": [lambda p=pair: _gated(*p) for pair in apart],
            "quantize": [
                lambda p=pair: operations.quantize(p[0], QUANTIZER, summed=False) for pair in pairs
            ],
            "norm_quantize": [
                lambda p=pair: operations.norm_quantize(
                    p[0], p[1][0], 1e-5, QUANTIZER, summed=False
                )
                for pair in pairs
            ],
        }
        case = f"hadamard_quant/{width}"
        seconds = results.measure(case, works, device)
        results.add(
            {f"ratio/{case}": seconds["ours"] / seconds["eager"]}
            | {f"floor/{case}": 5 * tokens * width / rates["copy"]}
        )
        ours, one = seconds["ours"], [lambda p=pair: fused(*p) for pair in apart]

        def take(case: str = case, ours: float = ours, one: Sequence[Work] = one) -> None:
            fastest = results.measure(case, {"fused": one}, device)["fused"]
            results.add({f"ratio/{case}/fused": ours / fastest})

        results.attempt(f"hadamard_quant/{width}/fused", take)


def _check(
    operations: Operations, rotation: OnlineRotation, gate: torch.Tensor, up: torch.Tensor
) -> None:
    """Raise ResultError unless some tokens get the definition's levels, but for float noise."""
    pair = gate[:16], up[:16]
    found, expected = (
        made(*pair, rotation, QUANTIZER)
        for made in (operations.gate_quantize, reference.gate_quantize)
    )
    check_levels(found, expected, str(gate.shape[1]))


def check_levels(found: TokenLevels, expected: TokenLevels, what: str) -> None:
    """Raise ResultError unless levels of `what` are the expected ones, but for float noise."""
    same = (found.levels == expected.levels).double().mean().item()
    if not same > _SAME:
        raise ResultError(f"only {same:.3%} of the levels of {what} are right")


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * up


def _gate(
    operations: Operations, rotation: OnlineRotation, gate: torch.Tensor, up: torch.Tensor
) -> Work:
    return lambda: operations.gate_quantize(gate, up, rotation, QUANTIZER, summed=False)
