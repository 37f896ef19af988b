"""Biases of keys that are kept apart come back where keys are read, exactly."""

import copy
import math

import pytest
import torch

from spinlab.config import ClipSearch, CodecConfig, KVConfig, QuantConfig, RotationConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.kv.bias import KeyBias
from spinlab.kv.bits import cache_bits
from spinlab.kv.cache import CodedCache, attach_kv, kv_path_of
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.path import KVPath, kv_path
from spinlab.learn import recompute_layers
from spinlab.learn.teacher import unquantized
from spinlab.model.modules import decoder_of, embedding_of, linear_at, map_of
from spinlab.networks.exact import ExactNetworks
from spinlab.networks.quantized import QuantizedNetworks, bits_of_cache
from spinlab.rotation.check import BrokenSite, check_invariance
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.layerwise import quantize_rtn

CODED = KVConfig(key_bias="coded")
FLOATS = QuantConfig(weights=QuantConfig().tied, activations=QuantConfig().tied)
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
BIASED = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"attention_bias": True}),
    "no rope": ("smollm3", {"attention_bias": True, "no_rope_layers": [0, 1]}),
    "padded width": ("qwen2", {"head_dim": 12}),
    "one head": ("qwen2", {"num_key_value_heads": 1}),
    "angles of pairs": ("gpt_oss", {"num_local_experts": 2, "sliding_window": 9}),
}


@pytest.fixture
def make_biased(make_family_model):
    """Return a maker of models whose key biases are far longer than what tokens add."""

    def make(case="qwen2", dtype=torch.float64, factor=300.0):
        family, changes = BIASED[case]
        model = make_family_model(family, **changes).to(dtype)
        for layer in map_of(model).layers:
            linear_at(model, layer.attention.keys).bias.data *= factor
        return model

    return make


def coded(model, config=None, store=True, r3=True):
    width = map_of(model).width("r3")
    path = kv_path(config or KVConfig(), width, hadamard_rotation(width) if r3 else None)
    attach_kv(model, path, store)
    return model


# the definition ---------------------------------------------------------------------------------


def turned(x, positions, theta=1e4):
    """RoPE as complex numbers: x (heads, tokens, d) at positions (tokens,)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones(()).double(), angle
    )
    return torch.cat((number.real, number.imag), -1)


def attention_by_hand(module, x, positions, r3, path, start):
    """One sequence's output (tokens, hidden) of an attention, in float64, bias by bias."""
    linears = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (
        (x @ m.weight.T).unflatten(-1, (-1, module.head_dim)).transpose(0, 1) for m in linears
    )
    b_q, b_k, b_v = (m.bias.view(-1, 1, module.head_dim).expand(-1, len(x), -1) for m in linears)
    q, v = turned(q + b_q, positions) @ r3, path.values.round(v + b_v)
    k = path.keys.round(turned(k, positions) @ r3) + turned(b_k, positions) @ r3
    k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
    scores = q @ k.mT / math.sqrt(module.head_dim)
    seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    seen[:, :start] = False
    weights = scores.masked_fill(~seen, -torch.inf)[:, start:].softmax(-1)
    return module.o_proj((weights @ v).transpose(0, 1).flatten(1)), start


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@torch.no_grad()
def test_attention_is_the_formula_written_out(make_biased, ids, kind):
    """Of a left-padded batch, whose sequences have positions of their own."""
    one = torch.ones(1, 1, dtype=torch.float64)
    random = OnlineRotation(one, random_orthogonal(8, torch.Generator().manual_seed(3)))
    r3 = {"hadamard": hadamard_rotation(8), "random": random}[kind]
    model, original = make_biased(), make_biased()
    path = kv_path(KVConfig(), 8, r3)
    attach_kv(model, path, store=True)
    seen = []
    attention = decoder_of(model).layers[0].self_attn
    keep = lambda m, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0]))  # noqa: E731
    attention.register_forward_hook(keep, with_kwargs=True)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions)
    (hidden, found), stock = seen[0], decoder_of(original).layers[0].self_attn
    for index, start in enumerate((0, 5)):
        expected, start = attention_by_hand(
            stock, hidden[index], positions[index].double(), r3.dense(), path, start
        )
        # the angles of RoPE are float32's
        assert torch.allclose(found[index, start:], expected, atol=2e-5)


@pytest.mark.parametrize("norm", [0, 605, 921])
def test_noise_of_logits_does_not_depend_on_the_bias(norm):
    """4 bits, heads of 128, keys with deviation 1.5; 605 and 921 are norms in Qwen2.5-7B."""
    g = torch.Generator().manual_seed(1)
    keys, queries = (torch.randn(1, 4, 512, 128, generator=g).double() for _ in range(2))
    keys, bias = 1.5 * keys, torch.randn(4, 128, generator=g).double()
    bias.unflatten(1, (2, -1))[:, :, :56] *= 0.05  # it lies in pairs that turn slowly
    bias *= norm / bias.norm(dim=-1, keepdim=True)
    angle = torch.arange(512)[:, None] * 1e4 ** (-torch.arange(64) / 64)
    waves = torch.cat((angle.cos(), angle.sin()), -1)[None].double()
    codec = AffineCodec(IntegerFormat(4, False), 128)
    apart = KeyBias(bias, rope=True, r3=hadamard_rotation(128))
    whole = apart.added(keys, waves)

    def noise(read):
        return ((read - whole) @ queries.mT / 128**0.5).std().item()

    assert noise(apart.added(codec.round(keys), waves)) == pytest.approx(0.15, abs=0.005)
    assert noise(codec.round(whole)) == pytest.approx({0: 0.15, 605: 4.9, 921: 7.1}[norm], rel=0.1)


# the networks -----------------------------------------------------------------------------------


def quantized(make, exact=True, kv=None, quant=None):
    quant = quant or QuantConfig()
    networks = (ExactNetworks if exact else QuantizedNetworks)(make, quant, kv or KVConfig())
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(RotationConfig(), map_of(make()), generator)
    return networks, rotations, quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})


@pytest.mark.parametrize("case", BIASED)
@torch.no_grad()
def test_emulated_integer_and_dequantized_networks_are_one_function(make_biased, ids, case):
    networks, *parts = quantized(lambda: make_biased(case))
    expected = networks.dequantized(*parts)(ids).logits
    for network in (networks.emulated(*parts), networks.integer(*parts, "torch")):
        assert torch.allclose(network(ids).logits, expected, atol=1e-8 * expected.std().item())
    networks, *parts = quantized(lambda: make_biased(case, torch.float32), exact=False)
    emulated = networks.emulated(*parts)(ids).logits
    assert torch.equal(networks.integer(*parts, "cpu")(ids).logits, emulated)


@torch.no_grad()
def test_a_long_bias_costs_nothing_when_it_is_apart(make_biased, ids):
    """The error of the logits is that of a short bias; coded it is many times that."""
    errors = {}
    for factor in (1.0, 300.0):
        for how in ("apart", "coded"):
            config = KVConfig(values=CodecConfig(bits=16), key_bias=how)
            make = lambda factor=factor: make_biased(factor=factor)  # noqa: E731
            found, original = coded(make(), config)(ids).logits, make()(ids).logits
            errors[factor, how] = ((found - original).norm() / original.norm()).item()
    assert errors[300, "apart"] < 2 * errors[1, "apart"]
    assert errors[300, "coded"] > 3 * errors[300, "apart"]


@torch.no_grad()
def test_without_quantizers_the_network_is_the_original(make_biased, ids):
    """So learning has its teacher, and its gradient passes the keys."""
    networks = QuantizedNetworks(make_biased, QuantConfig(), KVConfig())
    model, original = networks.learnable(RotationSet(r3=hadamard_rotation(8))), make_biased()
    expected = original(ids).logits
    with unquantized(model):
        assert torch.allclose(model(ids).logits, expected, atol=1e-9)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    layer = kv_path_of(model).new_layer()
    keys = torch.randn(1, 2, 3, 8, requires_grad=True)
    with torch.enable_grad():
        layer.round(keys, keys)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_layers_that_run_again_for_a_gradient_find_their_angles(make_biased, ids):
    """Also where another pass came between."""
    networks, gradients = QuantizedNetworks(make_biased, QuantConfig(), KVConfig()), []
    for again in (False, True):
        model = networks.learnable(RotationSet(r3=hadamard_rotation(8)))
        if again:
            recompute_layers(model)
        x = embedding_of(model)(ids).detach().requires_grad_()
        logits = model(inputs_embeds=x).logits
        model(ids[:, :5])
        logits.square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-12) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_of_16_bits_are_rounded_once(dtype):
    """The bias and its angles are float32's: a long bias would lose more than a codec does."""
    g = torch.Generator().manual_seed(0)
    keys, drawn = torch.randn(1, 2, 50, 32, generator=g).to(dtype), torch.randn(2, 32, generator=g)
    bias = KeyBias((30 * drawn).to(dtype), True, hadamard_rotation(32))
    angle = torch.arange(50.0)[None, :, None] * 1e4 ** (-torch.arange(16) / 16)
    waves = torch.cat((angle.cos(), angle.sin()), -1)
    found, exact = bias.added(keys, waves), bias.added(keys.double(), waves.double())
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 0.51 * torch.finfo(
        dtype
    ).eps * 2 ** exact.abs().max().log2().ceil()


@pytest.mark.parametrize("case", BIASED)
@torch.no_grad()
def test_a_bias_of_zeros_changes_no_bit(make_biased, ids, case):
    apart, together = (
        coded(make_biased(case, torch.float32, 0.0), kv)(ids).logits for kv in (None, CODED)
    )
    assert torch.equal(apart, together)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"attention_bias": True}),
        ("llama4_text", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "rope_parameters": DYNAMIC}),
    ],
    ids=["no bias", "a norm behind it", "lengths behind RoPE", "frequencies that change"],
)
@torch.no_grad()
def test_what_is_no_part_of_the_keys_by_itself_stays_with_them(
    make_family_model, ids, family, changes
):
    apart, together = (coded(make_family_model(family, **changes), kv) for kv in (None, CODED))
    assert map_of(apart).key_biases == frozenset() and kv_path_of(apart).biases == ()
    assert torch.equal(apart(ids).logits, together(ids).logits)


def test_16_bit_keys_keep_their_bias(make_biased, ids):
    kv = KVConfig(CodecConfig(bits=16))
    model = coded(make_biased(), kv)
    assert kv_path_of(model).biases == ()
    assert linear_at(model, "model.layers.0.self_attn.k_proj").bias.abs().max() > 10


@torch.no_grad()
def test_the_gate_sees_a_rope_that_turns_other_pairs(make_biased, ids, monkeypatch):
    """As a family would bring it that turns neighbours."""
    rotations = RotationSet(r3=hadamard_rotation(8))
    networks = QuantizedNetworks(make_biased, QuantConfig(), KVConfig())

    def gate():
        rotated = lambda: networks.rotated(rotations)  # noqa: E731
        return check_invariance(make_biased, rotated, rotations, ids[:1])

    assert gate() < 1e-9

    def neighbours(x, cos, sin):
        half = cos.shape[-1] // 2
        c, s = (t[:, None, :, :half].repeat_interleave(2, -1) for t in (cos, sin))
        across = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * c + across * s

    monkeypatch.setattr("spinlab.kv.bias.rotary", neighbours)
    with pytest.raises(BrokenSite, match=r"first at model\.layers\.0\.self_attn\.o_proj"):
        gate()


# the cache --------------------------------------------------------------------------------------


def whole(make_biased, case, ids, **told):
    return coded(make_biased(case), store=False)(ids, **told).logits


@pytest.mark.parametrize("case", BIASED)
@torch.no_grad()
def test_chunks_steps_and_crops_are_one_pass(make_biased, ids, case):
    """Oracle: the teacher-forced pass, which stores nothing."""
    model, expected = coded(make_biased(case)), whole(make_biased, case, ids)
    cache = CodedCache(kv_path_of(model), 2)
    parts = [model(p, past_key_values=cache).logits for p in ids.split([7, 5, *[1] * 12], 1)]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-9)
    cache.crop(-4)
    again = [model(p, past_key_values=cache).logits for p in ids[:, 20:].split([3, 1], 1)]
    assert torch.allclose(torch.cat(again, 1), expected[:, 20:], atol=1e-9)
    cache.reset()
    parts = [model(p, past_key_values=cache).logits for p in ids[:, :6].split([1, 5], 1)]
    assert torch.allclose(torch.cat(parts, 1), expected[:, :6], atol=1e-9)


@torch.no_grad()
def test_positions_are_those_that_rope_was_told(make_biased, ids):
    """Sequences that start elsewhere, skip, and repeat positions."""
    positions = torch.stack((torch.arange(24) + 7, torch.arange(24) // 2 * 3))
    expected = whole(make_biased, "qwen2", ids, position_ids=positions)
    assert not torch.allclose(expected, whole(make_biased, "qwen2", ids), atol=1e-2)
    model = coded(make_biased())
    cache, parts = CodedCache(kv_path_of(model), 2), []
    for part, position in zip(
        ids.split([9, 3, *[1] * 12], 1), positions.split([9, 3, *[1] * 12], 1), strict=True
    ):
        parts.append(model(part, position_ids=position, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-9)


@torch.no_grad()
def test_sequences_take_their_positions_along(make_biased, ids):
    """Of a left-padded batch: repeated, chosen and reordered. Oracle: each sequence alone."""
    model = coded(make_biased())
    cache, mask = CodedCache(kv_path_of(model), 2), torch.ones(2, 9, dtype=torch.int64)
    for change in (cache.batch_repeat_interleave, cache.batch_select_indices):
        change(torch.tensor([0]) if change == cache.batch_select_indices else 2)  # nothing yet
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids[:, :9], attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    order = torch.tensor([0, 0, 1, 1])
    for change, index in (
        (cache.batch_select_indices, torch.tensor([3, 0, 2])),
        (cache.reorder_cache, torch.tensor([1, 0, 1])),
        (cache.batch_select_indices, torch.tensor([True, True, False])),
    ):
        change(index)
        order = order[index]
        following = ids[order, 9:11]
        told = {
            "attention_mask": torch.cat((mask[order], torch.ones_like(following)), 1),
            "position_ids": positions[order, -1:] + torch.tensor([1, 2]),
        }
        found = model(following, past_key_values=cache, **told).logits
        for row, sequence in zip(found, order, strict=True):
            start = 4 * int(sequence)
            alone = whole(make_biased, "qwen2", ids[sequence : sequence + 1, start:11])
            assert torch.allclose(row, alone[0, -2:], atol=1e-9)
        cache.crop(-2)


@torch.no_grad()
def test_generation_by_beams_from_padding_is_that_without_a_cache(make_biased, ids):
    model, passing = coded(make_biased()), coded(make_biased(), store=False)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    told = {"attention_mask": mask, **settings}
    found = model.generate(ids[:, :9], **told)
    assert torch.equal(found, passing.generate(ids[:, :9], use_cache=False, **told))


@torch.no_grad()
def test_a_pass_that_broke_off_in_the_first_layer_is_forgotten(make_biased, ids):
    model, expected = coded(make_biased()), whole(make_biased, "qwen2", ids)
    cache = CodedCache(kv_path_of(model), 2)
    model(ids[:, :20], past_key_values=cache)
    hook = decoder_of(model).layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 20:22], past_key_values=cache)
    hook.remove()
    found = model(ids[:, 20:], past_key_values=cache).logits
    assert torch.allclose(found, expected[:, 20:], atol=1e-9)


@torch.no_grad()
def test_a_deep_copy_has_positions_of_its_own(make_biased, ids):
    model = coded(make_biased())
    twin, caches = copy.deepcopy(model), [CodedCache(kv_path_of(model), 2) for _ in range(2)]
    caches[1] = CodedCache(kv_path_of(twin), 2)
    parts: list[list[torch.Tensor]] = [[], []]
    for part in ids.split(8, 1):
        for network, cache, found in zip((model, twin), caches, parts, strict=True):
            found.append(network(part, past_key_values=cache).logits)
    assert torch.equal(torch.cat(parts[0], 1), torch.cat(parts[1], 1))


def test_a_copied_cache_goes_on_as_the_one_it_was_copied_from(make_biased, ids):
    """As the cache of a prompt that several answers share."""
    model = coded(make_biased())
    cache = CodedCache(kv_path_of(model), 2)
    model(ids[:, :16], past_key_values=cache)
    twin = copy.deepcopy(cache)
    expected = model(ids[:, 16:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 16:], past_key_values=twin).logits, expected)


def test_a_cache_without_the_biases_of_the_model_is_refused(make_biased, ids):
    model = make_biased()
    path = kv_path(KVConfig(), 8)
    attach_kv(model, path, store=True)
    with pytest.raises(InputError, match=r"begin with CodedCache\(kv_path_of\(model\), layers\)"):
        model(ids, past_key_values=CodedCache(path, 2))
    other = coded(make_biased())
    with pytest.raises(InputError, match="does not have the key biases of this model"):
        model(ids, past_key_values=CodedCache(kv_path_of(other), 2))


def test_positions_are_counted(make_biased, ids):
    model = coded(make_biased())
    cache, told = CodedCache(kv_path_of(model), 2), torch.arange(24).expand(2, -1)
    model(ids, past_key_values=cache)
    # 2 layers, keys and values, 2 heads of 8 numbers: 7 bytes; positions that sequences share
    assert cache.stored_bytes() == 48 * 2 * 2 * 2 * 7 + 24 * 4
    cache = CodedCache(kv_path_of(model), 2)
    model(ids, position_ids=told, past_key_values=cache)
    assert cache.stored_bytes() == 48 * 2 * 2 * 2 * 7 + 48 * 4
    assert bits_of_cache(model) == 7 * 8 / 8 + 32 / (2 * 2 * 2 * 8)
    assert bits_of_cache(coded(make_biased(), CODED)) == 7
    assert cache_bits(KVPath(apart=True), map_of(model).dimensions) == 16
