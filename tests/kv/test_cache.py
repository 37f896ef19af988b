"""The transformers cache: coded as it is filled, the same function whether it stores or not."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from spinlab.config import CodecConfig, KVConfig
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.kv.bits import cache_bits
from spinlab.kv.cache import CodedCache, attach_kv, attend_ungrouped
from spinlab.kv.path import KVPath, kv_path
from spinlab.model.layer import Dimensions
from spinlab.rotation.online import hadamard_rotation

KV4 = KVConfig()
OFF = CodecConfig(bits=16)


def coded(model, config=KV4, store=True):
    r3 = hadamard_rotation(8)
    path = KVPath(r3) if config is None else kv_path(config, 8, r3)
    attach_kv(model, path, store)
    return path


def test_r3_alone_does_not_change_the_model(make_model, ids):
    model, original = make_model(), make_model()
    coded(model, None)
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-10, rtol=0)


def test_keys_repeated_for_each_head_are_attended_as_shared_ones_are():
    """Oracle: torch's grouped attention, in float64, with its gradients."""
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    rows = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    found = attend_ungrouped(module, *rows, None, scaling=0.3)[0]
    expected = scaled_dot_product_attention(*rows, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(found, expected.transpose(1, 2))
    upstream = torch.randn(found.shape, generator=g, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(out, rows, weight)
        for out, weight in ((found, upstream), (expected, upstream.transpose(1, 2)))
    )
    assert all(torch.allclose(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attention_on_a_gpu_is_repeatable_and_exact_in_float32(make_model):
    """Also backward, and for heads that share their keys; oracle: the same on a CPU."""
    model = make_model(torch.float32).requires_grad_()
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    attach_kv(model, KVPath(), store=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 200), generator=generator)

    def logits_and_gradient(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.to(device).zero_grad()
        with torch.no_grad():
            logits = model(input_ids=ids.to(device)).logits
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        gradient = model.get_submodule("model.layers.0.self_attn.k_proj").weight.grad
        return logits.cpu(), gradient.cpu().clone()  # moving the model moves it too

    expected = logits_and_gradient("cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = [logits_and_gradient("cuda") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, again, other, theirs in zip(*found, expected, strict=True):
        assert torch.equal(ours, again) and torch.equal(ours, other)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_storing_and_not_storing_are_the_same_function(make_model, ids):
    storing, passing = make_model(torch.float32), make_model(torch.float32)
    coded(storing, store=True)
    coded(passing, store=False)
    assert torch.equal(storing(ids).logits, passing(ids).logits)
    assert passing(ids).past_key_values is None or passing(ids).past_key_values.stored_bytes() == 0


def test_quantizing_the_cache_changes_the_logits(make_model, ids):
    model, original = make_model(torch.float32), make_model(torch.float32)
    coded(model)
    assert not torch.allclose(model(ids).logits, original(ids).logits, atol=1e-3)


def test_decoding_token_by_token_equals_one_pass(make_model, ids):
    """Oracle: the teacher-forced pass, which stores nothing."""
    model, whole = make_model(), make_model()  # float64: one token's sums are not those of many
    path = coded(model)
    coded(whole, store=False)
    cache = CodedCache(path, layers=2)
    steps = [
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(ids.shape[1])
    ]
    assert torch.allclose(torch.cat(steps, 1), whole(ids).logits, atol=1e-9)
    assert cache.get_seq_length() == ids.shape[1]


def test_the_cache_holds_packed_bytes(make_model, ids):
    model = make_model(torch.float32)
    path = coded(model)
    cache = CodedCache(path, layers=2)
    model(ids, past_key_values=cache, use_cache=True)
    tokens = ids.numel()
    # 2 layers, keys and values, 2 heads of 8 numbers: 4 bytes of levels, 2 of scale, 1 of zero
    assert cache.stored_bytes() == tokens * 2 * 2 * 2 * 7
    assert cache.layers[0].kept.keys.dtype == torch.uint8


def test_generate_equals_a_loop_over_full_passes(make_model, ids):
    model, whole = make_model(torch.float32), make_model(torch.float32)
    coded(model)
    coded(whole, store=False)
    prompt = ids[:1, :5]
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = prompt
    for _ in range(8):
        following = whole(expected).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(found, expected)


def test_beam_search_reorders_coded_rows(make_model, ids):
    """Beams are reordered in the cache; with float codecs the result is the stock model's."""
    model, original = make_model(torch.float32), make_model(torch.float32)
    coded(model, None)
    settings = dict(max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    prompt = ids[:, :5]
    assert torch.equal(model.generate(prompt, **settings), original.generate(prompt, **settings))


def test_padding_on_the_left_does_not_change_the_answer(make_model, ids):
    model = make_model(torch.float32)
    coded(model)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids[:1, :6]], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 6)], dim=1).long()
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[:1, :6], **settings)[0, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[0, 9:], alone)


def test_a_filled_foreign_cache_is_refused(make_model, ids):
    model, original = make_model(torch.float32), make_model(torch.float32)
    foreign = DynamicCache(config=original.config)
    original(ids, past_key_values=foreign, use_cache=True)
    coded(model)
    with pytest.raises(InputError, match="filled DynamicCache cannot"):
        model(ids, past_key_values=foreign, use_cache=True)


def test_groups_must_divide_the_head():
    with pytest.raises(InputError, match=r"kv.values.group_size=3 does not divide 8"):
        kv_path(KVConfig(values=CodecConfig(group_size=3)), 8)


def test_effective_bits_are_the_mean_of_keys_and_values():
    sizes = Dimensions(hidden=16, head_dim=8, intermediate=16, layers=2, heads=2, kv_heads=2)
    assert cache_bits(kv_path(KVConfig(keys=OFF), 8), sizes) == (16 + 4 + 24 / 8) / 2


def test_queries_turn_with_r3_and_round_per_token_and_head():
    """DuQuant's fourth quantized tensor, against the formula written out."""
    path = kv_path(KVConfig(OFF, OFF, CodecConfig()), 8, hadamard_rotation(8))
    query = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    turned = query @ hadamard_rotation(8).dense().float()
    lowest = turned.amin(-1, keepdim=True).clamp(max=0)
    scale = ((turned.amax(-1, keepdim=True).clamp(min=0) - lowest) / 15).half().float()
    # 1/512 of a level, then levels, half to even: what is next to a tie is on it
    levels, zero = (((t / scale * 512).round() / 512).round() for t in (turned, -lowest))
    expected = ((levels + zero).clamp(0, 15) - zero) * scale
    assert torch.allclose(path.turn_queries(query), expected, atol=1e-6)


def test_keys_values_and_queries_have_settings_of_their_own():
    sides = (CodecConfig(clip_ratio=0.9), CodecConfig(symmetric=True), CodecConfig(bits=3))
    path = kv_path(KVConfig(*sides), 8)
    codecs = (path.keys, path.values, path.queries)
    assert [codec.clip_ratio for codec in codecs] == [0.9, 1, 1]
    assert [codec.grid for codec in codecs] == [
        IntegerFormat(4, False),
        IntegerFormat(4, True),
        IntegerFormat(3, False),
    ]


def test_finer_queries_come_closer_to_the_original(make_model, ids):
    original, errors = make_model(torch.float32)(ids).logits, []
    for bits in (2, 4, 8):
        model = make_model(torch.float32)
        coded(model, KVConfig(OFF, OFF, CodecConfig(bits=bits)))
        errors.append((model(ids).logits - original).norm())
    assert errors[2] < 0.2 * errors[1] < 0.2 * errors[0]


def test_a_cache_that_was_reset_serves_another_prompt(make_model, ids):
    model = make_model(torch.float32)
    cache = CodedCache(coded(model), layers=2)
    expected = model(ids[:, 9:15]).logits
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    cache.reset()
    parts = [model(p, past_key_values=cache).logits for p in ids[:, 9:15].split([4, 1, 1], 1)]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)
