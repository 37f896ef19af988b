"""E2M1, E4M3 and E8M0 as another library has them: all numbers, ties, and their neighbours.

Inputs are numbers of float32: a float64 the library takes by way of that.
"""

import numpy as np
import pytest
import torch

from spinlab.formats import FORMATS, Parameters
from spinlab.formats.integer import nearest, settled
from spinlab.formats.minifloat import codes_of, e8m0_of, levels_of, powers_of, round_e4m3
from spinlab.formats.mxfp4 import MXFP4
from tests.formats.test_float_groups import around

oracle = pytest.importorskip("ml_dtypes")

FLOATS = [torch.float32, torch.float64]


def table(name: str, codes: int) -> np.ndarray:
    """Return the numbers of the first so many bytes of a type, in float64."""
    return np.arange(codes, dtype=np.uint8).view(getattr(oracle, name)).astype(np.float64)


def half(dtype: torch.dtype) -> Parameters:
    """Return the scale 1 as levels have it, which are twice the numbers."""
    return Parameters(torch.full((1,), 0.5, dtype=dtype), torch.zeros(1, dtype=dtype))


def test_codes_stand_for_the_same_numbers():
    wanted = table("float4_e2m1fn", 16)
    levels = levels_of(torch.arange(16, dtype=torch.uint8))
    assert (levels / 2).tolist() == wanted.tolist()
    codes = codes_of(levels)
    codes[8] |= 8  # a zero has no sign here
    assert codes.tolist() == list(range(16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_are_rounded_to_e2m1_alike(dtype):
    values = [*table("float4_e2m1fn", 8).tolist(), 8.0]
    x = around(values, torch.float32)
    x = torch.cat((x, -x, torch.linspace(-9, 9, 20_001))).to(dtype)
    found = MXFP4(4, True).encode(x, half(dtype), nearest) / 2
    wanted = x.numpy().astype(oracle.float4_e2m1fn).astype(np.float64)
    assert found.double().tolist() == wanted.tolist()
    ties = around(values, dtype)[len(values) : 2 * len(values) - 1]
    stable = MXFP4(4, True).encode(ties, half(dtype), settled) / 2
    assert stable.tolist() == ties.numpy().astype(oracle.float4_e2m1fn).astype(np.float64).tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_are_rounded_to_e4m3_alike(dtype):
    values = table("float8_e4m3fn", 127)
    assert len(np.unique(values)) == 127 and values[-1] == 448
    x = torch.cat((around(values.tolist(), torch.float32), torch.logspace(-4, 2.6, 20_001)))
    x = x[x <= 448].to(dtype)
    wanted = x.numpy().astype(oracle.float8_e4m3fn).astype(np.float64)
    assert round_e4m3(x).double().tolist() == wanted.tolist()


def test_every_byte_of_e8m0_is_the_same_power_of_two():
    bytes_, wanted = torch.arange(256, dtype=torch.uint8), table("float8_e8m0fnu", 256)
    found = powers_of(bytes_)
    assert found[:255].double().tolist() == wanted[:255].tolist()
    assert found[255].isnan() and np.isnan(wanted[255])
    assert torch.equal(e8m0_of(found[:255]), bytes_[:255])
    stored = found[:255].numpy().astype(oracle.float8_e8m0fnu).view(np.uint8)
    assert stored.tolist() == list(range(255))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "up_from"), [("mxfp4_floor", 2.0), ("mxfp4", 1.75)])
def test_scales_of_mxfp4_are_the_e8m0_below_or_the_next_one(name, up_from, dtype):
    powers = table("float8_e8m0fnu", 255)[30:250]
    borders = [p * m for p in powers for m in (1.0, 1.5, 1.75)]
    quarters = around(borders, dtype)
    x = 4 * quarters  # of which the largest number of E2M1, 6 = 1.5·4, may become any
    found = FORMATS[name](4, True).parameters(-x, x / 2).scale * 2
    place = np.searchsorted(powers, quarters.double().numpy(), side="right") - 1
    below = np.where(place < 0, powers[0] / 2, powers[place])
    wanted = np.where(quarters.double().numpy() / below >= up_from, 2 * below, below)
    assert found.double().tolist() == wanted.tolist()
    store = FORMATS[name](4, True).store_scale(found.float()[None] / 2)["scale"][0]
    assert store.tolist() == wanted.astype(oracle.float8_e8m0fnu).view(np.uint8).tolist()
