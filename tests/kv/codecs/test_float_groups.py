"""Rows of small floats: bytes hold what fake quantization computes, and are counted."""

import pytest
import torch

from spinlab.config import CodecConfig
from spinlab.errors import InputError
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.codecs import make_codec
from spinlab.kv.codecs.float_groups import FLOATS, FloatGroupCodec

CODECS = [
    FloatGroupCodec(make(make.width, True), 64, ratio)
    for make in FLOATS.values()
    for ratio in (1.0, 0.9)
]


def heads(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 64, generator=g).pow(3) * torch.randn(5, 1, generator=g).exp()
    x[0, 0, 1] = 0
    x[0, 0, 2, :32] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_hold_exactly_what_fake_quantization_computes(codec, dtype):
    x = heads(dtype)
    rows, rounded = codec.encode_and_round(x)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, codec.row_bytes)
    assert torch.equal(rows, codec.encode(x))
    assert torch.equal(codec.decode(rows, dtype), rounded)
    assert torch.equal(rounded, codec.round(x))
    wanted = TokenQuantizer(codec.format, codec.format.group, codec.clip_ratio).round(x)
    assert torch.equal(rounded, wanted)
    alone = codec.encode(x[:1, :1, :1])
    assert torch.equal(alone, rows[:1, :1, :1])


def test_stored_bits_count_all_scales():
    assert make_codec("kv.keys", CodecConfig(codec="mxfp4"), 64, 0).bits == 4.25
    assert make_codec("kv.keys", CodecConfig(codec="nvfp4"), 64, 0).bits == 4.5 + 8 / 64
    for codec, bits, scale in (
        ("mxfp6_e3m2", 6, 8 / 32),
        ("mxfp8", 8, 8 / 32),
        ("fp8", 8, 32 / 64),
    ):
        assert (
            make_codec("kv.keys", CodecConfig(codec=codec, bits=bits), 64, 0).bits == bits + scale
        )


def test_settings_that_are_no_such_codec_are_refused():
    with pytest.raises(InputError, match=r"kv\.keys\.bits=3: nvfp4 codes 4 bits"):
        make_codec("kv.keys", CodecConfig(codec="nvfp4", bits=3), 64, 0)
    with pytest.raises(InputError, match=r"kv\.values\.bits=4: fp8 codes 8 bits; 16 switches"):
        make_codec("kv.values", CodecConfig(codec="fp8"), 64, 0)
    with pytest.raises(InputError, match="its group=32 does not divide 16"):
        make_codec("kv.keys", CodecConfig(codec="mxfp4"), 16, 0)
