"""GPTQ, GPTAQ and Qronos on the grids of small floats."""

import pytest
import torch

from spinlab.config import ClipSearch, GPTQConfig, TensorQuant, WeightsConfig
from spinlab.formats import FORMATS
from spinlab.formats.minifloat import MAGNITUDES
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.weights.gptq import Moment, error_spread, gptq
from spinlab.weights.mismatch import gptaq, mismatch, qronos
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import rtn
from tests.formats.test_coded import made

WIDTH = 128
NAMES = [name for name in FORMATS if name != "integer"]


def settings(name: str) -> TensorQuant:
    format = made(name)
    return TensorQuant(format.bits, True, format.group, format=name)


def rows(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the original's correlated inputs, and those of a network that is off and rounds."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=g) * torch.logspace(0, -1, WIDTH)[:, None]
    exact = torch.randn(512, WIDTH, generator=g) @ mix
    off = exact + exact @ (0.2 * torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5)
    return exact, TokenQuantizer(made(name), settings(name).group_size).round(off)


def rounded(method: str, name: str, weight: torch.Tensor, **changes) -> QuantizedWeight:
    exact, x = rows(name)
    hessian, cross = (Moment(WIDTH, x.device) for _ in range(2))
    hessian.add(x, x)
    cross.add(exact - x, x)
    config = WeightsConfig(method, ClipSearch(), gptq=GPTQConfig(**changes))
    if method == "gptq":
        return gptq(weight, error_spread(hessian.value(), config.gptq), settings(name), config)
    known = mismatch(hessian.value(), cross.value(), config.own)
    sweep = {"gptaq": gptaq, "qronos": qronos}[method]
    return sweep(weight, known, settings(name), config)


def error(found: QuantizedWeight, weight: torch.Tensor, name: str, method: str) -> float:
    """Return the change of outputs that the method makes small: from its own inputs' or others'."""
    exact, x = rows(name)
    wanted = (x if method == "gptq" else exact) @ weight.T
    return (x @ found.dequantize().T - wanted).square().sum().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_a_sweep_beats_rounding_to_nearest_and_stays_on_the_grid(method, name):
    weight = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    found, plain = rounded(method, name, weight), rtn(weight, settings(name), ClipSearch())
    assert error(found, weight, name, method) < 0.8 * error(plain, weight, name, method)
    levels = MAGNITUDES if "fp4" in name else range(made(name).highest + 1)
    assert set(found.levels.abs().unique().tolist()) <= set(levels)
    again = QuantizedWeight.from_tensors(found.tensors(), found.format, WIDTH)
    assert torch.equal(again.dequantize(), found.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_ranged_in_the_scale_of_the_whole_weight(name):
    """Also where one comes last, when all before it have left it their errors."""
    weight = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    weight[:, : WIDTH // 2] *= 2.0**-17  # beside the rest below the normal numbers of E4M3
    for changes in ({}, {"static_groups": True}, {"static_groups": True, "act_order": True}):
        found = rounded("gptq", name, weight, **changes)
        again = QuantizedWeight.from_tensors(found.tensors(), found.format, WIDTH)
        assert torch.equal(again.scale, found.scale)


@pytest.mark.parametrize("name", NAMES)
def test_static_groups_keep_the_ranges_of_rtn(name):
    weight = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
    found = rounded("gptq", name, weight, static_groups=True, act_order=True)
    assert torch.equal(found.scale, rtn(weight, settings(name), ClipSearch()).scale)
