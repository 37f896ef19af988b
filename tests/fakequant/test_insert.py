"""Fake quantization stands where the settings say, with the clips that were learned."""

from dataclasses import replace

import pytest
import torch

from spinlab.config import ClipSearch, KVConfig, QuantConfig, RotationConfig, TensorQuant
from spinlab.fakequant.insert import input_paths
from spinlab.formats import IntegerFormat
from spinlab.kv.cache import kv_path_of
from spinlab.model.map import input_key
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.weights.layerwise import quantize_rtn

QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
CLIPPED = replace(QUANT, activations=TensorQuant(clip_ratio=0.8))
GROUPS = ("qkv", "o", "gate_up", "down")
EVERYWHERE = {input_key(layer, group): 0.8 for layer in range(2) for group in GROUPS}


def drawn(make_model):
    model_map = map_of(make_model())
    return initial_rotations(RotationConfig(), model_map, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["dequantized", "emulated", "integer"])
def test_learned_clips_do_what_the_setting_does(make_model, ids, kind):
    rotations = drawn(make_model)
    learned = replace(rotations, clips=EVERYWHERE)
    weights = quantize_rtn(
        QuantizedNetworks(make_model, QUANT, KVConfig()).fused(rotations),
        QUANT,
        ClipSearch(),
        {},
    )

    def logits(rotations, quant):
        networks = QuantizedNetworks(lambda: make_model(torch.float32), quant, KVConfig())
        arguments = (rotations, weights, "cpu") if kind == "integer" else (rotations, weights)
        return getattr(networks, kind)(*arguments)(ids).logits

    found = logits(learned, QUANT)
    assert torch.equal(found, logits(rotations, CLIPPED))
    assert not torch.equal(found, logits(rotations, QUANT))


def test_every_input_takes_its_own_clip_and_the_others_the_setting(make_model):
    clips = {"0.o": 0.7, "1.down": 0.9}
    paths = input_paths(map_of(make_model()), replace(drawn(make_model), clips=clips), CLIPPED)
    assert paths.keys() == EVERYWHERE.keys()
    for key, path in paths.items():
        assert path.quantizer.clip_ratio == clips.get(key, 0.8)
        assert path.quantizer.format == IntegerFormat(4, False)


def test_clips_are_nothing_to_inputs_of_16_bits_and_to_the_cache(make_model):
    rotations = replace(drawn(make_model), clips=EVERYWHERE)
    wide = replace(QUANT, activations=TensorQuant(bits=16))
    for config in (None, wide):
        paths = input_paths(map_of(make_model()), rotations, config)
        assert all(path.quantizer is None for path in paths.values())
    network = QuantizedNetworks(make_model, QUANT, KVConfig()).learnable(rotations)
    assert kv_path_of(network).keys.clip_ratio == kv_path_of(network).values.clip_ratio == 1
