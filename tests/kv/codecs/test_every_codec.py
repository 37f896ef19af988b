"""What holds for every codec: bytes are what they say, and rows are coded each by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlab.config import CodecConfig, LloydMaxConfig, QJLConfig
from spinlab.kv.codecs import CODECS, make_codec

SETTINGS = [
    *(CodecConfig(bits=b, symmetric=s) for b in (2, 3, 4, 5, 8) for s in (False, True)),
    CodecConfig(bits=3, group_size=8, clip_ratio=0.9),
    *(CodecConfig(codec="lloyd_max", bits=b) for b in (1, 2, 3, 4, 7)),
    CodecConfig(codec="lloyd_max", bits=3, lloyd_max=LloydMaxConfig("hadamard", "norm", True)),
    CodecConfig(codec="lloyd_max", bits=2, lloyd_max=LloydMaxConfig("none", "eden")),
    *(CodecConfig(codec="qjl", bits=b) for b in (1, 3)),
    CodecConfig(codec="qjl", bits=2, run=4, qjl=QJLConfig(False, 3, 2)),
    *(CodecConfig(codec="kivi", bits=b, run=4) for b in (2, 3, 4, 8)),
    CodecConfig(codec="kivi", bits=2, run=6, symmetric=True, clip_ratio=0.9),
    CodecConfig(codec="mxfp4"),
    CodecConfig(codec="nvfp4", clip_ratio=0.9),
    *(CodecConfig(codec=f"mxfp6_{kind}", bits=6) for kind in ("e2m3", "e3m2")),
    CodecConfig(codec="mxfp8", bits=8, clip_ratio=0.9),
    CodecConfig(codec="fp8", bits=8),
]
GROUP = {"nvfp4": 16, **dict.fromkeys(("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"), 32)}


def name(codec: CodecConfig) -> str:
    return f"{codec.codec}-{codec.bits}-{codec.run}-{codec.group_size}-{codec.symmetric}"


def test_every_codec_is_here():
    assert {codec.codec for codec in SETTINGS} == set(CODECS)


@pytest.mark.parametrize("chosen", SETTINGS, ids=name)
@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([8, 16, 24, 40]),
    runs=st.integers(0, 3),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_bytes_are_as_many_as_they_say_and_rows_stand_alone(chosen, width, runs, size, seed):
    codec = make_codec("kv.keys", chosen, width * GROUP.get(chosen.codec, 8) // 8, 0)
    width = codec.width
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(2, 3, runs * codec.run, width, generator=generator).double()
    rows = codec.encode(x)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, runs, codec.row_bytes)
    assert codec.bits == 8 * rows[0, 0].numel() / (runs * codec.run * width) if runs else True
    found = codec.decode(rows, x.dtype)
    assert found.shape == x.shape and found.dtype == x.dtype and found.isfinite().all()
    assert torch.equal(found, codec.round(x))
    for n in range(runs):
        part = slice(n * codec.run, (n + 1) * codec.run)
        assert torch.equal(codec.encode(x[1:, :2, part]), rows[1:, :2, n : n + 1])
        alone = codec.decode(rows[1:, :2, n : n + 1], x.dtype)
        assert torch.allclose(alone, found[1:, :2, part], rtol=1e-12, atol=1e-12 * size)  # sums


@pytest.mark.parametrize("chosen", SETTINGS, ids=name)
def test_coding_is_the_same_in_every_dtype_up_to_its_noise(chosen):
    codec = make_codec("kv.keys", chosen, 2 * GROUP.get(chosen.codec, 8), 0)
    x = torch.randn(4, 24, codec.width, generator=torch.Generator().manual_seed(0)).to(
        torch.bfloat16
    )
    exact = codec.round(x.double())
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found = codec.round(x.to(dtype))
        assert found.dtype == dtype
        assert ((found - exact).abs() > atol).double().mean() < 0.01


@pytest.mark.parametrize("chosen", SETTINGS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_by_the_range_changes_no_number(chosen, dtype):
    """It moves entries at the extremes alone, where a codec has ranges."""
    codec = make_codec("kv.keys", chosen, 2 * GROUP.get(chosen.codec, 8), 0)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 24, codec.width, generator=generator).to(dtype) for _ in range(2))
    by_range = codec.pass_by_range(x.requires_grad_())
    assert torch.equal(by_range, codec.round(x.detach()))
    (found,) = torch.autograd.grad(by_range, x, upstream)
    others = (found != upstream).double().mean()
    assert 0 < others < 0.9 if chosen.codec not in ("lloyd_max", "qjl") else others == 0
