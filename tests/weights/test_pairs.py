"""The two networks that GPTAQ and Qronos compare are the ones that they are meant to be."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import (
    GPTAQConfig,
    GPTQConfig,
    KVConfig,
    QronosConfig,
    QuantConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.config.kv import CodecConfig
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.model.hooks import temporary_hooks
from spinlab.model.modules import linear_at, linears_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.base import Rounding
from spinlab.weights.layerwise import quantize_gptaq, quantize_gptq, quantize_qronos
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import round_to_nearest, rtn

OFF = TensorQuant(bits=16)
QUANT = QuantConfig(
    weights=TensorQuant(bits=3, symmetric=True),
    activations=TensorQuant(clip_ratio=0.9),
    embedding=TensorQuant(bits=3),
)
KV = KVConfig(queries=CodecConfig(bits=4))
ROTATIONS = RotationSet(r3=hadamard_rotation(8), r4=hadamard_rotation(40))
METHODS = {"gptq": quantize_gptq, "gptaq": quantize_gptaq, "qronos": quantize_qronos}
Weights = dict[str, QuantizedWeight]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def networks(make_model) -> Callable[..., QuantizedNetworks]:
    return lambda quant=QUANT, kv=KV: QuantizedNetworks(
        lambda: make_model(torch.float32, tie_word_embeddings=False), quant, kv
    )


def rounded(networks: QuantizedNetworks, windows, folder, method="gptaq", **changes) -> Weights:
    model, kinds = networks.fused(ROTATIONS), (GPTQConfig, GPTAQConfig, QronosConfig)
    own = dict(zip(METHODS, (kind(block_size=10, **changes) for kind in kinds), strict=True))
    config, kv = WeightsConfig(method, **own), networks.kv_path(model, ROTATIONS)
    folder.mkdir(exist_ok=True)
    rounding = Rounding(model, ROTATIONS, windows, networks.quant, config, folder, kv)
    return METHODS[method](rounding)


def multiplied(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return what every linear of a network multiplies, window by window."""
    seen: dict[str, list[torch.Tensor]] = {}

    def see(name: str, linear: FakeQuantLinear, args: tuple) -> None:
        seen.setdefault(name, []).append(linear.path(args[0]))

    with temporary_hooks() as hooks:
        for site, linear in linears_of(model):
            hooks.append(linear.register_forward_pre_hook(partial(see, site.path)))
        for window in windows:
            model(window[None], use_cache=False)
    return seen


@pytest.mark.parametrize("key_bias", [None, 5.0])
def test_both_inputs_are_those_of_whole_networks(
    make_model, windows, tmp_path, seen_pairs, key_bias
):
    """The original's are those of the rotated network with nothing rounded; the others those of
    the finished network, in which all that comes before a linear is as it was when it was seen."""

    def networks() -> QuantizedNetworks:
        return QuantizedNetworks(original_model, QUANT, KV)

    def original_model() -> PreTrainedModel:
        biased = key_bias is not None
        model = make_model(torch.float32, tie_word_embeddings=False, attention_bias=biased)
        for layer in range(2 if biased else 0):
            keys = linear_at(model, f"model.layers.{layer}.self_attn.k_proj")
            keys.bias.data.normal_(0, key_bias, generator=torch.Generator().manual_seed(layer))
        return model

    found = rounded(networks(), windows, tmp_path)
    original = multiplied(networks().rotated(ROTATIONS), windows)
    quantized = multiplied(networks().dequantized(ROTATIONS, found), windows)
    names = [n for n in original if n.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))]
    assert len(seen_pairs) == len(names) == 8
    for name, seen in zip(names, seen_pairs.values(), strict=True):
        for window, (exact, x) in enumerate(seen):
            torch.testing.assert_close(exact, original[name][window], msg=name)
            torch.testing.assert_close(x, quantized[name][window], msg=name)
            assert not torch.allclose(exact, x, atol=1e-2)


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_where_nothing_differs_yet_weights_are_those_of_gptq(networks, windows, tmp_path, method):
    """With inputs, keys and values of 16 bits the first linears meet the original's inputs."""
    quant = QuantConfig(weights=QUANT.weights, activations=OFF)
    exact = networks(quant, KVConfig(*(CodecConfig(bits=16) for _ in range(3))))
    found = rounded(exact, windows, tmp_path / method, method)
    expected = rounded(exact, windows, tmp_path / "gptq", "gptq")
    same = {n for n, w in found.items() if torch.equal(w.levels, expected[n].levels)}
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert first <= same
    assert "model.layers.1.mlp.down_proj" not in same


def test_outputs_come_closer_to_the_originals_than_by_gptq(networks, tmp_path):
    """Logits on new text, of networks with all that is rounded."""
    windows = torch.randint(0, 64, (60, 16), generator=torch.Generator().manual_seed(1))
    seen, new = windows[:48], windows[48:]
    expected, gaps = networks().rotated(ROTATIONS)(new).logits, {}
    for name in METHODS:
        found = rounded(networks(), seen, tmp_path / name, name)
        logits = networks().dequantized(ROTATIONS, found)(new).logits
        gaps[name] = (logits - expected).norm()
    assert gaps["gptaq"] < gaps["gptq"]
    assert gaps["qronos"] < gaps["gptq"]


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_a_killed_run_goes_on_with_the_same_bits(networks, windows, tmp_path, method):
    whole = rounded(networks(), windows, tmp_path, method)
    (tmp_path / "layer-001.safetensors").unlink()
    resumed = rounded(networks(), windows, tmp_path, method)
    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name].levels, weight.levels)


def test_the_model_that_is_left_is_the_quantized_network(networks, windows, tmp_path):
    """What is swapped for the original's passes is put back."""
    networks = networks()
    model = networks.fused(ROTATIONS)
    config = WeightsConfig("gptaq", gptaq=GPTAQConfig(block_size=10))
    kv = networks.kv_path(model, ROTATIONS)
    found = quantize_gptaq(Rounding(model, ROTATIONS, windows, QUANT, config, tmp_path, kv))
    assert found.keys() == {site.path for site in map_of(model).sites} | {"model.embed_tokens"}
    expected = networks.dequantized(ROTATIONS, found)(windows).logits
    assert torch.equal(model(windows).logits, expected)


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_learned_ranges_of_weights_are_kept_where_there_are_some(
    networks, windows, tmp_path, method
):
    model, name = networks().fused(ROTATIONS), "model.layers.1.self_attn.{}_proj"
    weight = linear_at(model, name.format("k")).weight
    ratios = torch.linspace(0.6, 0.9, len(weight)).view(-1, 1, 1)
    learned = replace(ROTATIONS, weight_clips={name.format("k"): ratios})
    config = WeightsConfig(method)
    found = METHODS[method](Rounding(model, learned, windows, QUANT, config, tmp_path))
    expected = round_to_nearest(weight, QUANT.weights, ratios)
    assert torch.equal(found[name.format("k")].scale, expected.scale)
    assert not torch.equal(found[name.format("k")].levels, expected.levels)
    beside = linear_at(networks().fused(ROTATIONS), name.format("q")).weight
    searched = rtn(beside, QUANT.weights, config.clip)
    assert torch.equal(found[name.format("q")].scale, searched.scale)
