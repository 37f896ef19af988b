"""Learned weight clipping: gradients, starts, resuming."""

from dataclasses import replace

import pytest
import torch

import spinlab.weights.lwc as lwc_module
from spinlab.config import (
    ClipSearch,
    FormatChange,
    LWCConfig,
    Override,
    QuantConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.model.modules import linear_at
from spinlab.rotation.fuse import fuse_inputs
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.base import Rounding
from spinlab.weights.layerwise import quantize_rtn
from spinlab.weights.lwc import ClippedWeight, quantize_lwc
from spinlab.weights.quantized import set_dequantized
from spinlab.weights.rtn import rtn

ROTATIONS = RotationSet(r4=hadamard_rotation(40))
QUANT = QuantConfig(weights=TensorQuant(bits=3), activations=TensorQuant(bits=6))
CONFIG = WeightsConfig("lwc", lwc=LWCConfig(epochs=4, lr=0.05))
FORMATS = [
    TensorQuant(symmetric=True),
    TensorQuant(),
    TensorQuant(bits=3, symmetric=True, group_size=8),
    TensorQuant(bits=3, group_size=16),
]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def make_fused(make_model):
    """Return a maker of identical models with a last layer more, so that none is followed by the
    final norm, and with the inverse of R4 in their weights."""

    def make():
        model = make_model(torch.float32, num_hidden_layers=3)
        fuse_inputs(model, ROTATIONS)
        return model

    return make


@pytest.fixture
def lwc(make_fused, windows, tmp_path):
    """Quantize identical models with learned ranges; what is done stays done."""

    def learn(quant, config):
        return quantize_lwc(Rounding(make_fused(), ROTATIONS, windows, quant, config, tmp_path))

    return learn


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_learning_starts_from_the_ranges_of_rtn(format):
    """Ratios near 1 excepted: a sigmoid ends below them."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    format = replace(format, clip_ratio=0.95)
    start = ClippedWeight(weight, format, ClipSearch()).quantized()
    assert torch.allclose(start.scale, rtn(weight, format, ClipSearch()).scale, rtol=1e-5)


@pytest.mark.parametrize("weights", [QUANT.weights, TensorQuant(bits=3, symmetric=True)], ids=str)
@pytest.mark.parametrize("clip_search", [True, False])
def test_learned_ranges_change_a_layers_output_less(lwc, make_fused, windows, clip_search, weights):
    quant = replace(QUANT, weights=weights)
    config = replace(CONFIG, clip=ClipSearch(search=clip_search))
    reference = make_fused()
    insert_fake_quant(reference, ROTATIONS, None)
    original = reference(windows, output_hidden_states=True).hidden_states
    learned = lwc(quant, config)
    nearest = quantize_rtn(make_fused(), quant, config.clip, {})
    errors = []
    for found in (learned, nearest):
        model = make_fused()
        for name, weight in found.items():
            set_dequantized(linear_at(model, name), weight)
        insert_fake_quant(model, ROTATIONS, quant)
        states = model(windows, output_hidden_states=True).hidden_states
        errors.append([(states[i] - original[i]).square().mean().item() for i in (1, 2)])
    assert all(ours < 0.95 * theirs for ours, theirs in zip(*errors, strict=True))


def test_learned_ranges_resume_with_the_same_bits(lwc, tmp_path):
    whole = lwc(QUANT, CONFIG)
    (tmp_path / "layer-001.safetensors").unlink()
    resumed = lwc(QUANT, CONFIG)
    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name].levels, weight.levels)
        assert torch.equal(resumed[name].scale, weight.scale)


def test_a_damaged_layer_of_learned_ranges_is_made_again_with_the_same_bits(lwc, tmp_path, caplog):
    whole, path = lwc(QUANT, CONFIG), tmp_path / "layer-001.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    resumed = lwc(QUANT, CONFIG)
    assert "the progress in layer-001.safetensors is damaged and is dropped" in caplog.text
    assert path.read_bytes() == sound
    for name, weight in whole.items():
        assert torch.equal(resumed[name].dequantize(), weight.dequantize())


def test_only_weights_of_fewer_than_16_bits_are_learned(lwc):
    overrides = [
        Override("*.0.*", weights=FormatChange(bits=16)),
        Override("*.down_proj", weights=FormatChange(bits=16)),
    ]
    quant = replace(QUANT, overrides=overrides, head=TensorQuant(bits=8))
    found = lwc(quant, replace(CONFIG, lwc=LWCConfig(epochs=1, lr=0.05)))
    assert len(found) == 13
    assert found.keys() >= {"lm_head", "model.layers.1.self_attn.q_proj"}


def test_layers_learn_from_quantized_inputs_towards_the_original(
    make_fused, windows, tmp_path, monkeypatch
):
    """What every layer is given: outputs of the rounded layers before it, and the original's."""
    seen: dict[str, torch.Tensor] = {}
    learn_layer = lwc_module._learn_layer

    def spy(rounding, inputs, targets):
        seen[f"in {inputs.index}"] = torch.cat(inputs.batches).clone()
        seen[f"out {inputs.index}"] = torch.cat(targets).clone()
        return learn_layer(rounding, inputs, targets)

    monkeypatch.setattr(lwc_module, "_learn_layer", spy)
    found = quantize_lwc(Rounding(make_fused(), ROTATIONS, windows, QUANT, CONFIG, tmp_path))

    original, rounded = make_fused(), make_fused()
    insert_fake_quant(original, ROTATIONS, None)
    for name, weight in found.items():
        set_dequantized(linear_at(rounded, name), weight)
    insert_fake_quant(rounded, ROTATIONS, QUANT)
    states = [m(windows, output_hidden_states=True).hidden_states for m in (original, rounded)]
    for layer in (0, 1):
        assert torch.allclose(seen[f"out {layer}"], states[0][layer + 1], atol=1e-3)
        assert torch.allclose(seen[f"in {layer}"], states[1][layer], atol=1e-3)
    assert not torch.allclose(states[0][1], states[1][1], atol=1e-2)
