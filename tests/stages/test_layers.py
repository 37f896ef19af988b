"""The error of the stream, layer by layer: against the definition, and nothing where nothing is."""

from dataclasses import replace

import pytest
import torch

from spinlab.config import ClipSearch, KVConfig, QuantConfig
from spinlab.learn.teacher import layer_states
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.layers import stream_errors
from spinlab.weights.layerwise import quantize_rtn


@pytest.fixture
def rotations() -> RotationSet:
    return RotationSet(r1=random_orthogonal(24, torch.Generator().manual_seed(0)))


def test_a_rotated_network_that_is_not_quantized_has_no_error(make_model, ids, rotations):
    networks = QuantizedNetworks(make_model, QuantConfig(), KVConfig())
    expected = layer_states(make_model(), ids[:1])
    errors = stream_errors(
        layer_states(networks.rotated(rotations), ids[:1]), expected, rotations.r1
    )
    assert len(errors) == 2
    assert max(errors) < 1e-12
    unturned = stream_errors(layer_states(networks.rotated(rotations), ids[:1]), expected, None)
    assert min(unturned) > 0.5  # the stream of the rotated network is another one


def test_the_error_is_that_of_every_token_on_its_own_scale(make_model, ids, rotations):
    networks = QuantizedNetworks(make_model, QuantConfig(), KVConfig())
    weights = quantize_rtn(networks.fused(rotations), networks.quant, ClipSearch(search=False), {})
    expected = layer_states(make_model(), ids[:1])
    network = networks.emulated(rotations, weights)
    found = stream_errors(layer_states(network, ids[:1]), expected, rotations.r1)
    states = layer_states(networks.emulated(rotations, weights), ids[:1])
    for layer, error in enumerate(found):
        x, other = expected[layer + 1][0], states[layer + 1][0].double() @ rotations.r1.T
        squares = [((o - t) ** 2).sum() / (t**2).sum() for o, t in zip(other, x, strict=True)]
        assert error == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-9)
        assert 0.01 < error < 2


def test_fewer_bits_make_larger_errors(make_model, ids, rotations):
    expected = layer_states(make_model(), ids[:1])
    found = []
    for bits in (8, 4):
        quant = QuantConfig()
        quant = replace(quant, weights=replace(quant.weights, bits=bits))
        quant = replace(quant, activations=replace(quant.activations, bits=bits))
        networks = QuantizedNetworks(make_model, quant, KVConfig())
        weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(search=False), {})
        network = networks.emulated(rotations, weights)
        found.append(stream_errors(layer_states(network, ids[:1]), expected, rotations.r1))
    assert all(eight < 0.5 * four for eight, four in zip(*found, strict=True))
