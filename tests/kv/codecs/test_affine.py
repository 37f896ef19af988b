"""Affine rows: bytes hold what fake quantization computes, and no more bits than they say."""

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.kv.codecs.affine import AffineCodec

CODECS = [
    AffineCodec(IntegerFormat(4, False), 64),
    AffineCodec(IntegerFormat(4, True), 64),
    AffineCodec(IntegerFormat(4, False), 64, group_size=16, clip_ratio=0.95),
    AffineCodec(IntegerFormat(2, False), 64, group_size=32),
    AffineCodec(IntegerFormat(2, True), 64),
    AffineCodec(IntegerFormat(3, False), 64),
    AffineCodec(IntegerFormat(3, True), 64, group_size=16),
    AffineCodec(IntegerFormat(6, True), 64),
    AffineCodec(IntegerFormat(8, False), 64),
    AffineCodec(IntegerFormat(8, True), 64),
]


def keys(scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_hold_exactly_what_fake_quantization_computes(codec):
    rows = codec.encode(keys())
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 3, 5, codec.row_bytes)
    assert torch.equal(codec.decode(rows, torch.float32), codec.round(keys()))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_single_row_decodes_as_among_others(codec):
    rows = codec.encode(keys())
    found = codec.decode(rows[:1, :1, :1], torch.float32)
    assert torch.equal(found, codec.decode(rows, torch.float32)[:1, :1, :1])
    alone = codec.encode(keys()[:1, :1, :1])
    assert torch.equal(alone, rows[:1, :1, :1])
    assert torch.equal(codec.decode(alone, torch.float32), found)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_no_number_moves_further_than_a_level(codec):
    x = keys()
    groups = x.unflatten(-1, (codec.groups, -1))
    span = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
    if codec.grid.symmetric:
        span = 2 * groups.abs().amax(-1, keepdim=True)
    level = span / (2**codec.grid.bits - 1 - codec.grid.symmetric)
    error = (codec.round(x).unflatten(-1, (codec.groups, -1)) - groups).abs()
    assert (error <= (1.05 if codec.clip_ratio == 1 else 2) * level).all()


def test_stored_bits_count_scales_and_zero_points():
    assert AffineCodec(IntegerFormat(4, False), 64).bits == 4 + 24 / 64
    assert AffineCodec(IntegerFormat(4, True), 128).bits == 4 + 16 / 128
    assert AffineCodec(IntegerFormat(4, False), 64, group_size=16).bits == 4 + 24 / 16
    assert AffineCodec(IntegerFormat(3, False), 64).bits == 3 + 24 / 64
    assert AffineCodec(IntegerFormat(2, True), 128).bits == 2 + 16 / 128
    assert AffineCodec(IntegerFormat(8, True), 64).bits == 8 + 16 / 64


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 1e4])
def test_extreme_magnitudes_stay_finite_and_close(size):
    codec = AffineCodec(IntegerFormat(4, False), 64)
    x = size * keys(1.0)
    found = codec.decode(codec.encode(x), torch.float32)
    assert found.isfinite().all()
    assert (found - x).abs().max() <= max(0.25 * size * 6, 1e-3)
