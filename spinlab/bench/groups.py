"""Time products of numbers in groups, as they are emulated, against one product of floats."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.nn import functional

from spinlab.bench.operands import random_floats
from spinlab.bench.products import Shape
from spinlab.bench.results import Results
from spinlab.config import ClipSearch, TensorQuant
from spinlab.errors import ResultError
from spinlab.fakequant.activations import InputPath
from spinlab.formats import FORMATS
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.kernels.matmul import groups as by_groups
from spinlab.runtime.kernels.matmul import kernel_for, outputs_for
from spinlab.runtime.stock.linear import IntegerLinear
from spinlab.weights.rtn import rtn

TOKENS, SHAPES = (16, 8192), ((1536, 576), (4096, 4096))
TIMED = {"integer": 32, "mxfp4": 32, "nvfp4": 16}  # by name, each with its group


def groups(
    operations: Operations,
    device: torch.device,
    rates: Mapping[str, float],
    results: Results,
    cases: tuple[Sequence[int], Sequence[Shape]] = (TOKENS, SHAPES),
) -> None:
    """Time the product of levels of 4 bits with a weight; cases: tokens, shapes (out, in).

    Inputs are rounded before. Beside it are the blocks one by one, which is the definition, and the
    same shapes in float32 and bfloat16: `ratio/…` is ours over the former, `speedup/…` the
    definition over ours.
    """
    generator = torch.Generator(device).manual_seed(6)
    for tokens in cases[0]:
        for out, width in cases[1]:
            x, weight = (
                random_floats(rows, width, generator=generator, dtype=torch.float32)
                for rows in (tokens, out)
            )
            for name in TIMED:
                linear = _linear(name, weight, device)
                inputs, tables = linear.encode(x), linear.tables()
                arguments = (inputs, tables, None, torch.float32)
                ours = partial(outputs_for(linear.matmul, tables), *arguments)
                definition = partial(by_groups.outputs, linear.matmul, *arguments)
                if not torch.equal(ours(), definition()):
                    raise ResultError(f"groups of {name} do not add up as by their definition")
                works = {"ours": [ours], "definition": [definition]}
                for dtype in (torch.float32, torch.bfloat16):
                    floats = partial(functional.linear, x.to(dtype), weight.to(dtype))
                    works[str(dtype).removeprefix("torch.")] = [floats]
                case = f"groups/{name}/{tokens}x{out}x{width}"
                seconds = results.measure(case, works, device)
                results.add({f"ratio/{case}": seconds["ours"] / seconds["float32"]})
                results.add({f"speedup/{case}": seconds["definition"] / seconds["ours"]})


def _linear(name: str, weight: torch.Tensor, device: torch.device) -> IntegerLinear:
    """Return a linear of a weight (out, in) that is rounded to a format, as inputs are."""
    group = TIMED[name]
    settings = TensorQuant(4, True, group, format=name)
    rounded = rtn(weight, settings, ClipSearch(search=False))
    path = InputPath(None, TokenQuantizer(FORMATS[name](4, True), group))
    matmul = kernel_for("torch", rounded.format, device)
    return IntegerLinear(rounded, None, path, matmul, torch.float32).to(device)
