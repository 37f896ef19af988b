"""Ratios that learning starts from: the same rounding as searched ones, with room to move."""

import pytest
import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.weights.lwc import ClippedWeight
from spinlab.weights.rtn import round_to_nearest, search_ratios, starting_ratios

# how far a ratio may move before its scale does: half a step of E4M3 at its finest, and of E8M0
ROOM = {"nvfp4": 1 / 32, "mxfp4": 0.4, "mxfp4_floor": 0.4, "mxfp6_e3m2": 0.4, "mxfp8": 0.4}
BITS = {"mxfp6_e3m2": 6, "mxfp8": 8, "fp8": 8}
SEARCH = ClipSearch()


def settings_of(name):
    group = 16 if name.startswith("nvfp4") else 32
    return TensorQuant(BITS.get(name, 4), symmetric=True, group_size=group, format=name)


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 256, generator=generator)
    weight[:, ::16] *= torch.rand(64, 16, generator=generator) * 8  # outliers that are clipped
    return weight / 20


@pytest.mark.parametrize(
    "name", [*ROOM, "mxfp4_mse", "nvfp4_four_over_six", "nvfp4_calibrated", "fp8", "integer"]
)
def test_they_round_as_searched_ratios_do(name, weight):
    settings = settings_of(name)
    searched, started = (f(weight, settings, SEARCH) for f in (search_ratios, starting_ratios))
    assert started.shape == searched.shape and started.min() > 0 and started.max() <= 1
    one, other = (round_to_nearest(weight, settings, ratio) for ratio in (searched, started))
    assert torch.equal(one.scale, other.scale) and torch.equal(one.levels, other.levels)


@pytest.mark.parametrize("name", ["mxfp4_mse", "nvfp4_four_over_six", "fp8", "integer"])
def test_scales_without_steps_of_their_own_keep_the_searched_ratios(name, weight):
    settings = settings_of(name)
    searched, started = (f(weight, settings, SEARCH) for f in (search_ratios, starting_ratios))
    assert torch.equal(searched, started)


@pytest.mark.parametrize("name", ROOM)
def test_small_steps_leave_scales_alone(name, weight):
    settings, room = settings_of(name), 0.99 * ROOM[name]
    started = starting_ratios(weight, settings, SEARCH)
    scale = round_to_nearest(weight, settings, started).scale
    up = (started * (1 + room)).clamp(max=1)
    assert torch.equal(round_to_nearest(weight, settings, up).scale, scale)
    inside = started[..., 0] < 1  # the whole range may lie anywhere in its step
    down = round_to_nearest(weight, settings, started * (1 - room / (1 + room))).scale
    assert inside.any() and torch.equal(down[inside], scale[inside])


def test_searched_ratios_have_no_such_room(weight):
    """Of a grid's ratios with the same scale the largest is taken: one step up changes it."""
    settings = settings_of("nvfp4")
    searched = search_ratios(weight, settings, SEARCH)
    scale = round_to_nearest(weight, settings, searched).scale
    up = round_to_nearest(weight, settings, (searched * 1.01).clamp(max=1)).scale
    assert ((up != scale) & (searched[..., 0] < 1)).sum() > 0.9 * (searched < 1).sum()


def test_lwc_starts_there(weight):
    settings = settings_of("nvfp4")
    started = starting_ratios(weight, settings, SEARCH)
    found = torch.sigmoid(ClippedWeight(weight, settings, SEARCH).gammas[0])
    torch.testing.assert_close(found, started.clamp(max=torch.tensor(4.0).sigmoid().item()))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_zeros_keep_their_range(name):
    assert (starting_ratios(torch.zeros(2, 32), settings_of(name), SEARCH) == 1).all()
