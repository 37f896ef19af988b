"""Time products with packed weights against torch's on bf16, for many tokens and for few."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from spinlab.bench.operands import QUANTIZER, random_floats, random_weight
from spinlab.bench.results import Results
from spinlab.bench.timing import Work, copies_for
from spinlab.errors import ResultError
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.formats import PackedWeight

Shape = tuple[int, int]  # out, in

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
PREFILL, DECODE = (2048, 8192), (1, 16)
# nominal dense rates on the tensor cores of one device: int8 over bfloat16
_INT8_OVER_BF16 = 2.0
_CLOSE = 2.0**-7  # bfloat16 outputs, each rounded once


def prefill(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], Sequence[Shape]] = (PREFILL, SHAPES),
) -> None:
    """Time quantize + linear on many tokens against bf16; cases: tokens, shapes."""
    generator = torch.Generator(device).manual_seed(1)
    for tokens in cases[0]:
        for out, width in cases[1]:
            x = random_floats(tokens, width, generator=generator)
            works = _products(operations, x, (out, width), generator)
            _check(operations, x, (out, width), generator)
            del works["w4a16"]  # for few tokens: many are bound by operations
            works["int_mm"] = _int_mm(x, out, generator)
            case = f"prefill/{tokens}x{out}x{width}"
            seconds = results.measure(case, works, device)
            moved = out * width / 2 + 2 * tokens * (width + out)
            work = 2 * tokens * out * width / (_INT8_OVER_BF16 * rates["bf16"])
            results.add(
                {
                    f"speedup/{case}": seconds["bf16"] / seconds["ours"],
                    f"floor/{case}": max(work, moved / rates["copy"]),
                }
            )


def decode(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], Sequence[Shape]] = (DECODE, SHAPES),
) -> None:
    """Time the linear alone, with the quantizer, and on 16-bit inputs against bf16."""
    generator = torch.Generator(device).manual_seed(2)
    for tokens in cases[0]:
        for out, width in cases[1]:
            x = random_floats(tokens, width, generator=generator)
            works = _products(operations, x, (out, width), generator)
            _check(operations, x, (out, width), generator)
            case = f"decode/{tokens}x{out}x{width}"
            seconds = results.measure(case, works, device)
            name, bf16 = f"{tokens}x{out}x{width}", seconds["bf16"]
            moved = out * width / 2 + tokens * (width + 2 * out)
            results.add(
                {
                    f"speedup/{case}": bf16 / seconds["linear"],
                    f"speedup/decode/with_quantize/{name}": bf16 / seconds["ours"],
                    f"speedup/decode/w4a16/{name}": bf16 / seconds["w4a16"],
                    f"floor/{case}": moved / rates["copy"],
                }
            )


def ours(
    operations: Operations,
    x: torch.Tensor,
    shape: Shape,
    generator: torch.Generator,
    quantizer: TokenQuantizer = QUANTIZER,
) -> dict[str, list[Work]]:
    """Return our work on x: (tokens, in): quantize + linear, linear alone, and W4A16."""
    out, width = shape
    count = copies_for(out * width // 2, x.device)
    weights = [random_weight(out, width, 1, generator) for _ in range(count)]
    levels = operations.quantize(x, quantizer, summed=False)  # as these weights have no zeros

    def whole(weight: PackedWeight) -> torch.Tensor:
        made = operations.quantize(x, quantizer, summed=False)
        return operations.linear(made, weight, None, x.dtype)

    return {
        "ours": [lambda w=w: whole(w) for w in weights],
        "linear": [lambda w=w: operations.linear(levels, w, None, x.dtype) for w in weights],
        "w4a16": [lambda w=w: operations.linear16(x, w, None) for w in weights],
    }


def _products(
    operations: Operations, x: torch.Tensor, shape: Shape, generator: torch.Generator
) -> dict[str, list[Work]]:
    """Return our work and torch's on bf16 weights."""
    out, width = shape
    dense = [
        random_floats(out, width, generator=generator) / width**0.5
        for _ in range(copies_for(2 * out * width, x.device))
    ]
    bf16: list[Work] = [lambda w=w: functional.linear(x, w) for w in dense]
    return {"bf16": bf16, **ours(operations, x, shape, generator)}


def _int_mm(x: torch.Tensor, out: int, generator: torch.Generator) -> list[Work]:
    """Return cuBLAS's product of int8 levels, without scales."""
    width, device = x.shape[1], x.device
    count = copies_for(out * width, device)
    draw = {"dtype": torch.int8, "generator": generator, "device": device}
    weights = [torch.randint(-8, 8, (out, width), **draw) for _ in range(count)]
    levels = torch.randint(-8, 8, x.shape, **draw)
    return [lambda w=w: torch._int_mm(levels, w.t()) for w in weights]  # pyright: ignore


def _check(
    operations: Operations, x: torch.Tensor, shape: Shape, generator: torch.Generator
) -> None:
    """Hold the first tokens of what is timed against an independent product, or raise."""
    weight = random_weight(*shape, 1, generator)
    dense = weight.levels().double() * weight.scale.double()
    levels = operations.quantize(x, QUANTIZER, summed=False)
    floats = (levels.levels[:4].double() - levels.zero[:4].double()) * levels.scale[:4].double()
    for found, expected in (
        (operations.linear(levels, weight, None, x.dtype)[:4], floats @ dense.mT),
        (operations.linear16(x[:4], weight, None), x[:4].double() @ dense.mT),
    ):
        error = (found.double() - expected).norm() / expected.norm()
        if not error < _CLOSE:
            raise ResultError(f"a product of {tuple(x.shape)} and {shape} is off by {error:.3g}")
