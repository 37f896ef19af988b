"""The fused runtime keeps biases of keys apart as the stock path does."""

import copy
import itertools

import pytest
import torch

from spinlab.config import ClipSearch, CodecConfig, KVConfig, QuantConfig, RotationConfig
from spinlab.model.modules import decoder_of, linear_at, map_of
from spinlab.networks.exact import ExactNetworks
from spinlab.networks.quantized import bits_of_cache
from spinlab.rotation.initial import initial_rotations
from spinlab.runtime.fused.convert import integer_runtime, new_cache
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.weights.layerwise import quantize_rtn

KV8 = KVConfig(CodecConfig(bits=8), CodecConfig(bits=8), CodecConfig(bits=8))
EVERY_CACHE = pytest.mark.parametrize("kv", [KVConfig(), KV8], ids=["packed", "plain"])
FAMILIES = {
    "qwen2": {},
    "llama": {"attention_bias": True, "num_key_value_heads": 1},
    "smollm3": {"attention_bias": True, "no_rope_layers": [0, 1]},
}


@pytest.fixture
def prepare(make_family_model):
    """Return what prepares networks whose key biases are far longer than what tokens add."""

    def make(family="qwen2", kv=None, rotation=None):
        def biased():
            model = make_family_model(family, **FAMILIES[family])
            for layer in map_of(model).layers:
                linear_at(model, layer.attention.keys).bias.data *= 300
            return model

        networks = ExactNetworks(biased, QuantConfig(), kv or KVConfig())
        generator = torch.Generator().manual_seed(0)
        rotations = initial_rotations(rotation or RotationConfig(), map_of(biased()), generator)
        fused = networks.fused(rotations)
        return networks, rotations, quantize_rtn(fused, QuantConfig(), ClipSearch(), {})

    return make


def runtime(networks, rotations, weights):
    model = networks.fused(rotations)
    integer_runtime(model, networks.parts(model, rotations, weights), REFERENCE)
    return model


def assert_same(found, expected):
    assert torch.allclose(found, expected, rtol=0, atol=1e-8 * expected.std().item())


EACH = RotationConfig(r3="random", r3_per_layer=True)


@EVERY_CACHE
@pytest.mark.parametrize("rotation", [None, EACH], ids=["one R3", "one for each layer"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_passes_chunks_and_steps_are_the_fake_quantized_network(prepare, ids, family, rotation, kv):
    prepared = prepare(family, kv, rotation)
    model, expected = runtime(*prepared), prepared[0].dequantized(*prepared[1:])(ids).logits
    assert_same(model(ids).logits, expected)
    cache = new_cache(model, 9)  # too small: it has to grow
    parts = [model(p, past_key_values=cache).logits for p in ids.split([7, 5, *[1] * 12], dim=1)]
    assert_same(torch.cat(parts, 1), expected)
    cache.crop(-4)
    assert_same(model(ids[:, 20:21], past_key_values=cache).logits, expected[:, 20:21])
    cache.reset()
    one_by_one = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    assert_same(torch.cat(one_by_one, 1), expected[:, :4])


@EVERY_CACHE
@torch.no_grad()
def test_positions_are_those_that_rope_was_told(prepare, ids, kv):
    """Padding, steps that skip, and a sequence that starts elsewhere."""
    prepared = prepare(kv=kv)
    model, oracle = runtime(*prepared), prepared[0].integer(*prepared[1:], "torch")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = torch.stack(((torch.arange(24) - 9).clamp(min=0), torch.arange(24) * 3 + 5))
    cache, caches, found, expected = new_cache(model, 24), {}, [], []
    cuts = [0, 5, 12, *range(13, 25)]
    for begin, end in itertools.pairwise(cuts):
        told = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        found.append(model(ids[:, begin:end], past_key_values=cache, **told).logits)
        stock = oracle(ids[:, begin:end], use_cache=True, **told, **caches)
        caches = {"past_key_values": stock.past_key_values}
        expected.append(stock.logits)
    assert_same(torch.cat(found, 1)[mask.bool()], torch.cat(expected, 1)[mask.bool()])


@EVERY_CACHE
@torch.no_grad()
def test_generation_by_beams_from_padding_is_that_of_the_stock_path(prepare, ids, kv):
    prepared = prepare(kv=kv)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    told = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 2}):
        found, expected = (
            model.generate(ids[:, :9], **told, **more)
            for model in (runtime(*prepared), prepared[0].integer(*prepared[1:], "cpu"))
        )
        assert torch.equal(found, expected)


@EVERY_CACHE
@torch.no_grad()
def test_sequences_take_their_positions_along(prepare, ids, kv):
    model = runtime(*prepare(kv=kv))
    cache, mask = new_cache(model, 16), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids[:, :9], mask, positions, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    order = torch.tensor([0, 1, 0])
    following = ids[order, 9:11]
    told = positions[order, -1:] + torch.tensor([1, 2])
    found = model(following, None, told, past_key_values=cache).logits
    for row, sequence in zip(found, order.tolist(), strict=True):
        assert_same(row, model(ids[sequence : sequence + 1, 4 * sequence : 11]).logits[0, -2:])


@torch.no_grad()
def test_copies_and_broken_passes_keep_to_their_own_positions(prepare, ids):
    model = runtime(*prepare())
    expected, twin = model(ids).logits, copy.deepcopy(model)
    caches = [new_cache(model, 24), new_cache(twin, 24)]
    for network, cache in zip((model, twin), caches, strict=True):
        network(ids[:, :20], past_key_values=cache)
    hook = decoder_of(model).get_submodule("norm").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 20:22], past_key_values=caches[0])
    hook.remove()
    for network, cache in zip((model, twin), caches, strict=True):
        assert_same(network(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])


@torch.no_grad()
def test_positions_are_counted(prepare, ids):
    model = runtime(*prepare())
    cache = new_cache(model, 256)
    model(ids, past_key_values=cache)
    # 2 layers, keys and values, 2 heads of 8 numbers in 7 bytes; a position of 4 bytes
    assert cache.stored_bytes() == 2 * 256 * (2 * 2 * 2 * 7 + 4)
    assert bits_of_cache(model) == 7 + 32 / (2 * 2 * 2 * 8)
