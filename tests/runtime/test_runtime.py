"""The fused runtime is the fake-quantized network, for every family and cache."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from spinlab.config import (
    ClipSearch,
    CodecChange,
    CodecConfig,
    FormatChange,
    KVConfig,
    KVOverride,
    Override,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.model.modules import decoder_of, head_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.orthogonal import exact_hadamard
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.convert import integer_runtime, new_cache, runtime_from_packed
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.runtime.fused.products import PackedProduct
from spinlab.runtime.kernels.formats import pack_weight
from spinlab.runtime.kernels.matmul import cublas
from spinlab.weights.layerwise import quantize_rtn

SYMMETRIC = TensorQuant(symmetric=True)
OFF = CodecConfig(bits=16)
KV8 = KVConfig(CodecConfig(bits=8), CodecConfig(bits=8))
QUANT = QuantConfig(weights=SYMMETRIC)
GREEDY = {"do_sample": False, "pad_token_id": 0}


def prepared(make, quant=QUANT, kv=None, rotation=None):
    networks = QuantizedNetworks(make, quant, kv or KVConfig())
    generator = torch.Generator().manual_seed(0)
    model_map = map_of(make())
    rotations = initial_rotations(rotation or RotationConfig(), model_map, generator)
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})
    return networks, rotations, weights


def runtime(networks, rotations, weights):
    model = networks.fused(rotations)
    integer_runtime(model, networks.parts(model, rotations, weights), REFERENCE)
    return model


def assert_same(found, expected):
    assert torch.allclose(found, expected, rtol=0, atol=1e-8 * expected.std().item())


@pytest.mark.parametrize(
    "quant",
    [
        QUANT,
        QuantConfig(weights=TensorQuant(group_size=8), o_proj_per_head=False),
        QuantConfig(weights=SYMMETRIC, activations=TensorQuant(bits=8, symmetric=True)),
        QuantConfig(weights=TensorQuant(bits=3), activations=TensorQuant(bits=16)),
        QuantConfig(weights=SYMMETRIC, activations=TensorQuant(group_size=8, clip_ratio=0.9)),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_runtime_is_the_fake_quantized_network(make_model, ids, quant, caplog):
    """In float64, where no rounding can flip a level: the three are one function."""
    networks, rotations, weights = prepared(make_model, quant)
    model = runtime(networks, rotations, weights)
    assert "outside" not in caplog.text
    found = model(ids).logits
    assert_same(found, networks.dequantized(rotations, weights)(ids).logits)
    assert_same(found, networks.integer(rotations, weights, "cpu")(ids).logits)
    assert_same(model(ids, use_cache=False).logits, found)


@pytest.mark.parametrize(
    "kv",
    [
        KVConfig(OFF, OFF),
        KV8,
        KVConfig(values=OFF, queries=CodecConfig()),
        KVConfig(CodecConfig(bits=3, symmetric=True), CodecConfig(symmetric=True, clip_ratio=0.9)),
        KVConfig(CodecConfig(group_size=4), CodecConfig(group_size=4)),
        KVConfig(CodecConfig(codec="lloyd_max", bits=3), CodecConfig(codec="qjl", bits=2)),
        KVConfig(overrides=[KVOverride("*.1.*", CodecChange(bits=8), CodecChange(bits=16))]),
        KVConfig(first_layers=1),
    ],
    ids=str,
)
@torch.no_grad()
def test_every_cache_format_gives_teacher_forced_logits(make_model, ids, kv):
    """A prefill, a chunk on the filled cache, then token by token; oracle: the fake network."""
    networks, rotations, weights = prepared(make_model, kv=kv)
    model = runtime(networks, rotations, weights)
    expected = networks.dequantized(rotations, weights)(ids).logits
    cache = new_cache(model, 9)  # too small: it has to grow
    parts = [model(p, past_key_values=cache).logits for p in ids.split([7, 5, *[1] * 12], dim=1)]
    assert_same(torch.cat(parts, 1), expected)
    assert cache.get_seq_length() == 24
    cache.crop(-4)
    assert_same(model(ids[:, 20:21], past_key_values=cache).logits, expected[:, 20:21])
    cache.reset()
    one_by_one = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    assert_same(torch.cat(one_by_one, 1), expected[:, :4])


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (
            KVConfig(CodecConfig(codec="qjl", bits=1)),
            "QJLCodec of 3 bits and AffineCodec of 7 bits",
        ),
        (KVConfig(overrides=[KVOverride("*.1.*", CodecChange(bits=8))]), "AffineCodec of 11 bits"),
    ],
    ids=["all layers", "one layer"],
)
def test_codecs_that_kernels_lack_are_named_once(make_model, kv, words, caplog):
    with caplog.at_level(logging.WARNING):
        runtime(*prepared(make_model, kv=kv))
    (found,) = [r.message for r in caplog.records if "outside the attention" in r.message]
    assert words in found and ";" not in found


@pytest.mark.parametrize("kv", [KVConfig(), KV8], ids=["packed", "plain"])
@torch.no_grad()
def test_sequences_of_a_cache_are_repeated_chosen_and_cut(make_model, ids, kv):
    """As transformers' caches do; oracle: passes over the whole of each sequence."""
    model = runtime(*prepared(make_model, kv=kv))
    cache = new_cache(model, 24)
    for change in (cache.batch_repeat_interleave, cache.batch_select_indices):
        change(torch.tensor([0]) if change == cache.batch_select_indices else 2)  # nothing yet
    model(ids[:, :9], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    order, following = torch.tensor([0, 0, 1, 1]), ids[:, 9:11].repeat(2, 1)

    def assert_whole(kept: int) -> None:
        whole = torch.cat((ids[order, :kept], following[: len(order)]), dim=1)
        found = model(following[: len(order)], past_key_values=cache).logits
        assert_same(found, model(whole).logits[:, kept:])
        cache.crop(-2)

    assert_whole(9)
    order = order[[3, 0, 0]]
    cache.batch_select_indices(torch.tensor([3, 0, 0]))
    assert_whole(9)
    order = order[:2]
    cache.batch_select_indices(torch.tensor([True, True, False]))
    cache.crop(-4)
    assert_whole(5)
    cache.crop(0)
    assert cache.get_seq_length() == 5
    with pytest.raises(InputError, match="-n removes the last n tokens"):
        cache.crop(3)
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    assert_whole(0)


@torch.no_grad()
def test_assisted_generation_is_plain_generation(make_model, ids):
    """It draws several tokens at once and crops those that were wrong from both caches."""
    model, small = runtime(*prepared(make_model)), make_model(num_hidden_layers=1)
    prompt = ids[:1, :6]
    settings = {"max_new_tokens": 12, **GREEDY}
    expected = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, assistant_model=small, **settings), expected)


@pytest.mark.parametrize(("family", "adds"), [("llama", True), ("granite", False)])
@torch.no_grad()
def test_products_add_to_the_stream_where_layers_do_no_more(make_family_model, ids, family, adds):
    """Of four products of a layer two: o_proj and down_proj."""
    model, seen = runtime(*prepared(lambda: make_family_model(family))), []

    def watched(*given):
        seen.append(given[-1] is not None)
        return REFERENCE.linear(*given)

    for module in model.modules():
        if isinstance(module, PackedProduct):
            module.operations = replace(REFERENCE, linear=watched)
    model(ids)
    assert seen == [False, adds] * 2 * map_of(model).dimensions.layers


FAMILIES = {
    "mistral": {},
    "qwen2": {"head_dim": None, "hidden_size": 48},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [0, 1]},
    "olmo2": {"attention_bias": True},
    "olmo3": {},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "exaone4": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"hidden_act": "silu"},
    "gemma3_text": {"hidden_activation": "silu", "final_logit_softcapping": 2.0},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "granite": {
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3},
        **{"attention_multiplier": 0.2, "logits_scaling": 5.0},
    },
    "phi3": {
        "hidden_size": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families_keep_their_biases_norms_and_partial_rope(make_family_model, fitting, ids, family):
    def make():
        return make_family_model(family, **FAMILIES[family])

    rotation = fitting(RotationConfig(), map_of(make()))
    networks, rotations, weights = prepared(make, rotation=rotation)
    model = runtime(networks, rotations, weights)
    expected = networks.dequantized(rotations, weights)(ids).logits
    cache = new_cache(model, 24)
    parts = [model(p, past_key_values=cache).logits for p in ids.split([22, 1, 1], dim=1)]
    assert_same(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("kv", [KVConfig(), KV8], ids=["packed", "plain"])
@pytest.mark.parametrize("rope", [[1, 0], [0, 0], [1, 1]], ids=str)
@torch.no_grad()
def test_layers_without_rope_get_none(make_family_model, ids, rope, kv):
    """Oracle: the fake network, on the stock model's attention; RoPE does change the logits."""
    made = [
        prepared(lambda r=r: make_family_model("smollm3", no_rope_layers=r), kv=kv)
        for r in (rope, [1 - has for has in rope])
    ]
    model = runtime(*made[0])
    expected, other = (networks.dequantized(*rest)(ids).logits for networks, *rest in made)
    cache = new_cache(model, 24)
    parts = [model(p, past_key_values=cache).logits for p in ids.split([22, 1, 1], dim=1)]
    assert_same(torch.cat(parts, 1), expected)
    assert not torch.allclose(expected, other, atol=1e-2)


@torch.no_grad()
def test_a_layer_of_its_own_scaling_keeps_it(make_model, ids):
    """What one layer's attention says holds for that layer."""

    def make(*dtype):
        model = make_model(*dtype)
        decoder_of(model).layers[1].self_attn.scaling *= 3
        return model

    networks, rotations, weights = prepared(make)
    expected = networks.dequantized(rotations, weights)(ids).logits
    assert_same(runtime(networks, rotations, weights)(ids).logits, expected)


@pytest.mark.parametrize(
    "kv", [KVConfig(), KV8, KVConfig(queries=CodecConfig())], ids=["packed", "plain", "queries"]
)
@torch.no_grad()
def test_every_layer_has_its_own_r3(make_model, ids, kv):
    """In one pass, in chunks and step by step; a layer with another one's is another function."""
    settings = RotationConfig(r3="random", r3_per_layer=True)
    networks, rotations, weights = prepared(make_model, QUANT, kv, settings)
    logits = networks.dequantized(rotations, weights)(ids).logits
    model = runtime(networks, rotations, weights)
    assert_same(model(ids).logits, logits)
    cache = new_cache(model, ids.shape[1])
    parts = [model(p, past_key_values=cache).logits for p in ids.split([7, 5, *[1] * 12], dim=1)]
    assert_same(torch.cat(parts, 1), logits)
    assert_same(networks.integer(rotations, weights, "torch")(ids).logits, logits)
    first = replace(rotations, r3=rotations.r3.at(0))
    other = networks.dequantized(first, weights)(ids).logits
    assert (other - logits).abs().max() > 1e-3 * logits.std()


@torch.no_grad()
def test_rotations_across_heads_and_random_ones_keep_the_function(make_model, ids):
    kinds = {"r2": "none", "r3": "random", "r4": "random", "cross_head": "hadamard"}
    quant = QuantConfig(weights=SYMMETRIC, o_proj_per_head=False)
    networks, rotations, weights = prepared(make_model, quant, None, RotationConfig(**kinds))
    model = runtime(networks, rotations, weights)
    assert_same(model(ids).logits, networks.dequantized(rotations, weights)(ids).logits)


@torch.no_grad()
def test_transforms_of_single_inputs_run_in_torch_before_the_quantizer(make_model, ids):
    """DuQuant's, on an input that is normed and on one that is gated."""
    inputs = {}
    for key, width in (("0.qkv", 24), ("1.down", 40), ("1.o", 32)):
        block = exact_hadamard(8)[None].expand(width // 8, -1, -1).contiguous()
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        inputs[key] = ScaledDual(dual=DualTransform(block, order, block))
    rotations = RotationSet(r3=hadamard_rotation(8), inputs=inputs)
    networks = QuantizedNetworks(make_model, QUANT, KVConfig())
    weights = quantize_rtn(networks.fused(rotations), QUANT, ClipSearch(), {})
    model = runtime(networks, rotations, weights)
    assert_same(model(ids).logits, networks.dequantized(rotations, weights)(ids).logits)


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        (QuantConfig(weights=TensorQuant(bits=8)), "8-bit weights"),
        (
            QuantConfig(
                weights=SYMMETRIC,
                overrides=[Override("*.v_proj", weights=FormatChange(symmetric=False))],
            ),
            "beside others of another format",
        ),
        (
            QuantConfig(weights=SYMMETRIC, activations=TensorQuant(bits=10)),
            "10-bit inputs",
        ),
        (
            QuantConfig(
                weights=TensorQuant(group_size=8),
                overrides=[Override("*_attn.[qkv]_proj", activations=FormatChange(group_size=12))],
            ),
            "do not nest",
        ),
    ],
    ids=["8 bits", "mixed", "10 bits", "nesting"],
)
@torch.no_grad()
def test_what_kernels_lack_runs_in_torch_with_one_warning(make_model, ids, quant, reason, caplog):
    networks, rotations, weights = prepared(make_model, quant)
    with caplog.at_level(logging.WARNING):
        model = runtime(networks, rotations, weights)
    warnings = [r.message for r in caplog.records if "outside the 4-bit kernels" in r.message]
    (warning,) = warnings
    assert reason in warning and "model.layers.0." in warning
    assert_same(model(ids).logits, networks.dequantized(rotations, weights)(ids).logits)


@torch.no_grad()
def test_linears_without_quantized_weights_keep_their_own(make_model, ids):
    quant = QuantConfig(weights=TensorQuant(bits=16), activations=TensorQuant(bits=16))
    networks, rotations, _ = prepared(make_model)
    networks = QuantizedNetworks(make_model, quant, KVConfig(OFF, OFF))
    found = runtime(networks, rotations, {})(ids).logits
    assert torch.allclose(found, make_model()(ids).logits, atol=1e-9)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(make_model, ids):
    """Every sequence of a padded batch gets the tokens it gets alone."""
    networks, rotations, weights = prepared(make_model)
    model = runtime(networks, rotations, weights)
    lengths = [9, 4]
    alone = [
        model.generate(ids[i : i + 1, :n], max_new_tokens=5, **GREEDY)[0, n:]
        for i, n in enumerate(lengths)
    ]
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for i, n in enumerate(lengths):
        padded[i, 9 - n :], mask[i, 9 - n :] = ids[i, :n], 1
    found = model.generate(padded, attention_mask=mask, max_new_tokens=5, **GREEDY)[:, 9:]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("kv", [KVConfig(), KV8], ids=["packed", "plain"])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_padding_longer_than_the_chunks_of_a_prefill_changes_nothing(make_model, ids, size, kv):
    model = runtime(*prepared(make_model, kv=kv))
    prompt, mask = ids[:, :9].clone(), torch.ones(2, 9, dtype=torch.int64)
    prompt[1, :5] = mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, **GREEDY}
    found = model.generate(prompt, prefill_chunk_size=size, **settings)
    assert torch.equal(found, model.generate(prompt, **settings))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, seen, parts = new_cache(model, 9), 0, []
    for part, position in zip(prompt.split(size, 1), positions.split(size, 1), strict=True):
        seen += part.shape[1]
        out = model(part, mask[:, :seen], position, past_key_values=cache)
        parts.append(out.logits)
    expected = model(prompt, mask, positions).logits
    assert_same(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])
    assert torch.cat(parts, 1).isfinite().all()


@torch.no_grad()
def test_padding_elsewhere_is_refused(make_model, ids):
    """In later chunks, too."""
    model = runtime(*prepared(make_model))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(InputError, match="padding on the left only"):
        model(ids, attention_mask=mask)
    expected = model(ids).logits
    cache = new_cache(model, 24)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(InputError, match="padding on the left only"):
        model(ids[:, 20:], attention_mask=mask, past_key_values=cache)
    with pytest.raises(InputError, match=r"shape \(2, 4\) meets 2 sequences of 24 tokens"):
        model(ids[:, 20:], attention_mask=mask[:, :4], past_key_values=cache)
    assert_same(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])
    with pytest.raises(InputError, match=r"\(batch, tokens\) only"):
        model(ids, attention_mask=torch.ones(2, 1, 24, 24))


def test_generate_equals_the_existing_integer_network(make_model, ids):
    """Greedy and by beams, which reorder the cache."""
    networks, rotations, weights = prepared(make_model)
    model, stock = (
        runtime(networks, rotations, weights),
        networks.integer(rotations, weights, "cpu"),
    )
    prompt = ids[:, :6]
    for settings in ({"max_new_tokens": 8}, {"max_new_tokens": 6, "num_beams": 3}):
        found = model.generate(prompt, **settings, **GREEDY)
        assert torch.equal(found, stock.generate(prompt, **settings, **GREEDY))


def test_generate_takes_the_capacity_it_needs_and_reuses_it(make_model, ids):
    model = runtime(*prepared(make_model))
    settings = {"max_new_tokens": 300, "max_time": 0.01, **GREEDY}
    found = model.generate(ids[:1, :6], return_dict_in_generate=True, **settings)
    slots = found.past_key_values.slots
    assert slots.capacity == 320  # 305 in blocks of 64: the last token is not stored
    held = [t.clone() for t in slots.tensors()]
    model.generate(ids[:1, :6], **GREEDY, max_new_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(held, slots.tensors(), strict=True))
    del found
    again = new_cache(model, 320)
    model(ids[:1], past_key_values=again)
    assert again.slots is slots  # of the cache that is gone


def test_slots_of_another_capacity_are_not_reused(make_model, ids):
    """Kernels split sequences by capacity: results would depend on the caches before."""
    model = runtime(*prepared(make_model))
    model(ids, past_key_values=new_cache(model, 320))
    cache = new_cache(model, 64)
    model(ids, past_key_values=cache)
    assert cache.slots.capacity == 64


def test_other_caches_are_refused(make_model, ids):
    model, other = runtime(*prepared(make_model)), runtime(*prepared(make_model))
    cache = new_cache(model, 24)
    model(ids[:, :8], past_key_values=cache)
    with pytest.raises(InputError, match="cache belongs to another model"):
        other(ids[:, 8:], past_key_values=cache)
    stock = DynamicCache()
    make_model()(ids[:, :8], past_key_values=stock)
    with pytest.raises(InputError, match="a filled DynamicCache cannot be coded"):
        model(ids[:, 8:], past_key_values=stock)


@torch.no_grad()
def test_a_deep_copy_runs_on_weights_and_caches_of_its_own(make_model, ids):
    model = runtime(*prepared(make_model))
    settings = {"max_new_tokens": 3, **GREEDY}
    expected, tokens = model(ids).logits, model.generate(ids[:, :6], **settings)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    assert torch.equal(twin.generate(ids[:, :6], **settings), tokens)
    with pytest.raises(InputError, match="another model"):
        twin(ids, past_key_values=new_cache(model, 24))
    head_of(twin).weight.zero_()
    assert not twin(ids).logits.any()
    assert not twin(ids, past_key_values=new_cache(twin, 24)).logits.any()
    assert torch.equal(model(ids).logits, expected)


def test_the_cache_holds_packed_bytes(make_model, ids):
    model = runtime(*prepared(make_model))
    cache = new_cache(model, 256)
    assert cache.stored_bytes() == 0
    model(ids, past_key_values=cache)
    # 2 layers, keys and values, 2 heads of 8 numbers: 4 bytes of levels, 2 of scale, 1 of zero
    assert cache.stored_bytes() == 2 * 256 * 2 * 2 * 2 * 7


def test_a_pass_that_broke_off_leaves_the_cache_as_it_was(make_model, ids):
    model = runtime(*prepared(make_model))
    expected = model(ids).logits
    cache = new_cache(model, 24)
    model(ids[:, :20], past_key_values=cache)
    hook = decoder_of(model).get_submodule("norm").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 20:22], past_key_values=cache)
    hook.remove()
    assert_same(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])


def test_a_sliding_window_is_refused_only_where_it_is_reached(make_family_model, ids):
    networks, rotations, weights = prepared(lambda: make_family_model("mistral", sliding_window=16))
    model = runtime(networks, rotations, weights)
    expected = networks.dequantized(rotations, weights)(ids[:, :16]).logits
    assert_same(model(ids[:, :16]).logits, expected)
    with pytest.raises(InputError, match="24 tokens exceed the model's sliding window of 16"):
        model(ids)


def test_other_activations_are_refused(make_model):
    networks, rotations, weights = prepared(lambda: make_model(hidden_act="gelu"))
    with pytest.raises(InputError, match="activation is gelu"):
        runtime(networks, rotations, weights)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_act": "gelu"}, "activation is gelu"), ({"sliding_window": 16}, "window of 16")],
    ids=["gelu", "window"],
)
@torch.no_grad()
def test_auto_takes_the_exact_product_where_the_runtime_cannot_run(
    make_family_model, ids, changes, reason, caplog
):
    def make():
        return make_family_model("mistral", **changes)

    networks, rotations, weights = prepared(make)
    found = networks.integer(rotations, weights, "auto")(ids).logits
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert reason in warning
    assert_same(found, networks.integer(rotations, weights, "torch")(ids).logits)
    with pytest.raises(InputError, match=reason):
        networks.integer(rotations, weights, "triton")(ids)


@torch.no_grad()
def test_auto_takes_the_runtime_where_it_runs(make_family_model, ids, caplog):
    networks, rotations, weights = prepared(lambda: make_family_model("mistral", sliding_window=64))
    model = networks.integer(rotations, weights, "auto")
    assert isinstance(model(ids).past_key_values, IntegerCache)
    assert not caplog.records


def test_a_runtime_from_packed_weights_is_the_one_from_quantized_weights(make_model, ids):
    networks, rotations, weights = prepared(make_model)
    model = runtime(networks, rotations, weights)
    asked = {}

    def make_weight(name, out, width, groups):
        asked[name] = (out, width, groups)
        return pack_weight(weights[name], groups, torch.float64)

    built = runtime_from_packed(
        make_model(tie_word_embeddings=False).config,
        make_weight,
        networks.parts(make_model(), rotations, {}),
        REFERENCE,
        torch.device("cpu"),
        torch.float64,
    )
    assert asked["model.layers.1.self_attn.o_proj"] == (24, 32, 4)  # a group per head
    assert not any(t.is_meta for t in (*built.parameters(), *built.buffers()))
    for name in ("model.embed_tokens", "lm_head"):
        built.get_submodule(name).weight.data.copy_(model.get_submodule(name).weight)
    # stock norms are float32 inside, those of the other model are not
    assert torch.allclose(built(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 40, 24), (33, 17, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_padded_integer_product_is_exact(shape, dtype):
    """Oracle: int64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, width, out = shape
    levels, weight = (torch.randint(-128, 128, (n, width)) for n in (tokens, out))
    levels = levels.to(torch.int8) if dtype == torch.int8 else (levels + 128).to(torch.uint8)
    weight = weight.to(torch.int8)
    expected = levels.long() @ weight.long().T
    found = cublas.matmul(levels.to(device), weight.to(device))
    assert torch.equal(found.cpu().long(), expected)
