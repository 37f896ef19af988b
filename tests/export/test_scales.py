"""Scales in 16 bits: a weight moves by half a level of its row at most, or a sentence says so."""

import pytest
import torch

from spinlab.errors import InputError
from spinlab.export.scales import stored_scale
from spinlab.formats import IntegerFormat
from spinlab.formats.integer import smallest_scale
from spinlab.weights.quantized import QuantizedWeight


def weight(scale: list[float], bits: int = 4, level: int = -8) -> QuantizedWeight:
    scales = torch.tensor([scale])
    levels = torch.zeros(1, 32 * len(scale)).short()
    levels[:, ::32] = level
    return QuantizedWeight(levels, scales, torch.zeros_like(scales), IntegerFormat(bits, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "level"), [(4, -8), (8, -128)])
def test_every_normal_scale_is_held(dtype, bits, level):
    g = torch.Generator().manual_seed(0)
    for exponent in range(-13, 15):
        scale = ((1 + torch.rand(8, generator=g)) * 2.0**exponent).tolist()
        stored = stored_scale("w", weight(scale, bits, level), dtype)
        assert torch.equal(stored, torch.tensor([scale]).to(dtype))


@pytest.mark.parametrize(
    ("scale", "bits", "level", "fits"),
    [
        ([1e-6], 4, -8, True),  # no normal number, and near enough for 16 levels
        ([1.04e-6], 8, -128, False),  # not for 256
        ([2e-8], 4, 1, False),  # zero, and its level is not
        ([2e-8], 4, 0, True),
        ([smallest_scale(torch.float32)] * 2, 4, 7, True),  # zeros, whatever their levels
        ([2e-8, 1e-2], 4, -8, True),  # next to nothing in its row
        ([1e5], 4, 0, False),
        ([float("nan"), 1.0], 4, 1, False),
    ],
)
def test_scales_of_float16_move_no_weight_to_another_level(scale, bits, level, fits):
    odd = weight(scale, bits, level)
    if fits:
        assert stored_scale("w", odd, torch.float16).shape == odd.scale.shape
        return
    with pytest.raises(InputError, match=r"the scale of w holds .*use export\.artefact"):
        stored_scale("w", odd, torch.float16)
