"""Levels of few rows in NumPy are those of torch, bit for bit."""

import numpy as np
import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.formats import integer_numpy as few
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.codecs.affine import AffineCodec

QUANTIZERS = [
    TokenQuantizer(IntegerFormat(4, False)),
    TokenQuantizer(IntegerFormat(4, True), clip_ratio=0.9),
    TokenQuantizer(IntegerFormat(8, False), group_size=16),
    TokenQuantizer(IntegerFormat(8, True), group_size=8, clip_ratio=0.77),
    TokenQuantizer(IntegerFormat(3, False), clip_ratio=torch.tensor(0.83)),
]


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Return rows of every kind: plain, loud, tiny, one-sided, on ties, nothing but zeros."""
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    x = torch.randn(7, 48, generator=g, dtype=torch.float64)
    x[1] *= 1e4
    x[2] *= 1e-36
    x[3], x[4] = x[3].abs() + 1, -x[4].abs()
    x[5] = 3 * x[5].sign()
    x[6] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_levels_of_few_rows_are_the_definitions(quantizer, dtype):
    for x in (rows(dtype), rows(dtype).T.contiguous().T):  # the second with strides
        expected, found = quantizer.to_bytes(x), quantizer.to_few_bytes(x)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(torch.from_numpy(a), b)
            assert torch.from_numpy(a).dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "grid", [IntegerFormat(4, False), IntegerFormat(4, True), IntegerFormat(8, False)], ids=str
)
def test_of_one_row_scale_and_zero_are_scalars_and_the_definitions(grid, dtype):
    quantizer = TokenQuantizer(grid, clip_ratio=0.9)
    for x in rows(dtype):
        expected, found = quantizer.to_bytes(x), quantizer.to_few_bytes(x)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(torch.as_tensor(a).view(b.shape), b)
            assert torch.as_tensor(a).dtype == b.dtype
        assert np.ndim(found.scale) == np.ndim(found.zero) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "grid", [IntegerFormat(4, False), IntegerFormat(4, True), IntegerFormat(8, False)], ids=str
)
def test_few_rows_are_coded_as_many_are(grid, dtype, monkeypatch):
    codec = AffineCodec(grid, 48, group_size=24, clip_ratio=0.95)
    x = rows(dtype)
    found = codec.encode(x)
    monkeypatch.setattr("spinlab.formats.twins.TWINS", {})
    assert torch.equal(found, codec.encode(x))


def test_scales_of_float64_are_rounded_to_float16_in_the_same_way():
    """From just above a tie of float16, which float32 takes for the tie itself."""
    x = torch.tensor([[0, 15 * (1 + 2**-11 + 2**-40)]], dtype=torch.float64)
    quantizer = TokenQuantizer(IntegerFormat(4, False, half_scale=True))
    for one in (quantizer.encode(x).scale, torch.as_tensor(quantizer.few(x).scale)):
        assert one.item() == 1


def test_few_is_a_matter_of_numbers_and_place():
    assert few.are_few(torch.ones(1, 2048))
    assert not few.are_few(torch.ones(0, 8))
    assert not few.are_few(torch.ones(2048, 2048))
    assert not few.are_few(torch.ones(1, 8, device="meta"))
