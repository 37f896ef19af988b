"""The presets of the cache, and the sweep over them."""

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from spinlab.compose import CONF, composed, options_of
from spinlab.config import CodecChange, CodecConfig, KVConfig, KVOverride, LloydMaxConfig
from spinlab.errors import InputError
from spinlab.kv.bits import CONTEXT, cache_bits, cache_bytes
from spinlab.kv.codecs import CODECS
from spinlab.kv.path import kv_path
from spinlab.model.layer import Dimensions

SIZES = {d: Dimensions(4 * d, d, 8 * d, layers=6, heads=4, kv_heads=2) for d in (16, 64, 128)}
NAMES = [f"model.layers.{n}.self_attn" for n in range(6)]
SWEPT = OmegaConf.load(CONF / "sweep" / "kv.yaml").hydra.sweeper.params.kv


@cache
def kv_of(name: str) -> KVConfig:
    return composed(f"kv={name}").kv


@pytest.mark.parametrize("name", options_of("kv"))
@pytest.mark.parametrize("width", SIZES)
def test_every_preset_makes_its_codecs(name, width):
    """Of the toy's heads, and of those of models; a layer takes as many bytes as are counted."""
    kv = kv_of(name)
    if width < 32 and kv.keys.codec.startswith("mxfp"):
        pytest.skip("the group of this format is wider than a head")
    path, sizes = kv_path(kv, width, layers=NAMES), SIZES[width]
    keys, values = torch.randn(2, 1, 2, 200, width, dtype=torch.bfloat16)
    taken = 0
    for layer in range(sizes.layers):
        kept = path.new_layer(layer)
        kept.append(keys, values)
        taken += kept.bytes
    assert taken == cache_bytes(path, sizes, 200)


def test_the_sweep_is_over_presets_of_every_codec():
    swept = [name.strip() for name in SWEPT.split(",")]
    assert len(swept) == len(set(swept)) >= 20 and set(swept) <= set(options_of("kv"))
    chosen = [kv_of(name) for name in swept]
    used = {side.codec for kv in chosen for side in (kv.keys, kv.values) if side.quantizes}
    assert used == set(CODECS)
    settings = composed("+experiment=kv", "+sweep=kv")
    assert settings.eval.continued == 256 and not settings.quant.rounds_weights
    assert not settings.quant.quantizes("activations") and not settings.learn.steps


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("codec", "most"),
    [
        (CodecConfig(), 0.29),
        (CodecConfig(codec="lloyd_max", bits=3, lloyd_max=LloydMaxConfig("none", "norm")), 0.22),
    ],
    ids=["int4", "3-bit lloyd_max"],
)
def test_a_full_cache_takes_the_share_of_16_bits_that_its_codec_has(codec, most, width):
    """Measured on one layer of 4096 tokens."""
    path = kv_path(KVConfig(codec, codec), width)
    kept, plain = path.new_layer(), path.uncoded().new_layer()
    keys, values = torch.randn(2, 1, 2, CONTEXT, width, dtype=torch.bfloat16)
    kept.append(keys, values)
    plain.append(keys, values)
    assert kept.bytes / plain.bytes <= most
    assert cache_bits(path, SIZES[width]) == 16 * kept.bytes / plain.bytes


def test_bits_count_what_stays_in_16_bits():
    kv = KVConfig(sinks=4, window=128, first_layers=1, last_layers=2)
    path, sizes = kv_path(kv, 64, layers=NAMES), SIZES[64]
    coded, row = 4096 - 132, 32 + 3
    of_layer = 2 * 2 * (coded * row + 132 * 128)
    assert cache_bytes(path, sizes, 4096) == 3 * of_layer + 3 * 2 * 2 * 4096 * 128
    assert cache_bits(path, sizes, 100) == 16  # all of it is in the window
    assert cache_bits(path, sizes, 10**6) == pytest.approx((16 + 8 * row / 64) / 2, rel=1e-3)


def test_an_override_of_layers_that_stay_in_16_bits_is_refused():
    override = KVOverride("*.layers.0.*", keys=CodecChange(bits=8))
    with pytest.raises(InputError, match=r"matches only layers that kv\.first_layers=1"):
        kv_path(KVConfig(overrides=[override], first_layers=1), 64, layers=NAMES)
    path = kv_path(KVConfig(overrides=[override], last_layers=1), 64, layers=NAMES)
    assert path.sides(0).keys != path.sides(1).keys
