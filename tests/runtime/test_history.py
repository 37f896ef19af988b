"""Sinks and a window of floats in the fused runtime: it is the stock, fake-quantized network."""

import copy
import itertools
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinlab.config import CodecChange, CodecConfig, KVConfig, KVOverride, LloydMaxConfig
from spinlab.errors import InputError
from spinlab.kv.bits import cache_bits
from spinlab.kv.cache import CodedCache, kv_path_of
from spinlab.model.modules import decoder_of, linear_at, map_of
from spinlab.networks.quantized import bits_of_cache
from spinlab.runtime.fused import attention, history
from spinlab.runtime.fused.convert import new_cache
from tests.runtime.test_runtime import GREEDY, OFF, assert_same, prepared, runtime

FOUR = CodecConfig(symmetric=True)  # what it rounds it rounds to itself
THREE, EIGHT = CodecConfig(bits=3), CodecConfig(bits=8, symmetric=True)
LEVELS = CodecConfig(
    codec="lloyd_max", bits=2, lloyd_max=LloydMaxConfig(turn="none", length="norm")
)
BOTH = KVConfig(FOUR, FOUR, sinks=2, window=5)
KVS = {
    "both": BOTH,
    "levels": KVConfig(LEVELS, THREE, sinks=1, window=4),
    "sinks alone": KVConfig(FOUR, LEVELS, sinks=3),
    "window alone": KVConfig(THREE, THREE, window=6),
    "window of one": KVConfig(THREE, FOUR, window=1),
    "longer than the text": KVConfig(FOUR, FOUR, sinks=2, window=64),
    "in torch": KVConfig(EIGHT, FOUR, sinks=2, window=5),
    "values alone": KVConfig(OFF, THREE, sinks=1, window=3),
    "queries": KVConfig(FOUR, FOUR, CodecConfig(), sinks=2, window=5),
    "some layers": KVConfig(FOUR, FOUR, sinks=2, window=5, first_layers=1),
    "layers of their own": KVConfig(
        FOUR, LEVELS, sinks=2, window=5, overrides=[KVOverride("*.1.*", CodecChange(bits=8))]
    ),
}
CHUNKS = pytest.mark.parametrize("queries", [512, 4], ids=["one chunk", "chunks of queries"])


@pytest.fixture(params=KVS)
def kv(request):
    return KVS[request.param]


@pytest.fixture(scope="module")
def made():
    """Return a maker of networks that makes every one of them once."""
    known = {}

    def make(make_model, kv, **changes):
        key = repr((kv, changes))
        if key not in known:
            known[key] = prepared(lambda *dtype: make_model(*dtype, **changes), kv=kv)
        return known[key]

    return make


def passes(model, ids, sizes, cache):
    found = [model(p, past_key_values=cache).logits for p in ids.split(sizes, dim=1)]
    return torch.cat(found, 1)


@CHUNKS
@torch.no_grad()
def test_one_pass_chunks_and_steps_are_the_fake_quantized_network(
    make_model, made, ids, kv, queries, monkeypatch
):
    """A cache that grows; also behind a reset."""
    monkeypatch.setattr(history, "_QUERIES", queries)
    networks, *rest = made(make_model, kv)
    model, expected = runtime(networks, *rest), networks.dequantized(*rest)(ids).logits
    assert_same(model(ids).logits, expected)
    cache = new_cache(model, 9)  # too small: it has to grow
    for sizes in ([7, 5, *[1] * 12], [1] * 24, [1, 1, 14, 6, 2], [3, 21], [6, 8, 10]):
        assert_same(passes(model, ids, sizes, cache), expected)
        cache.reset()


EXACT = ["both", "sinks alone", "window alone", "window of one", "in torch", "values alone"]
SAME = {name: KVConfig(*(FOUR if k.bits < 8 else k for k in (kv.keys, kv.values)), sinks=kv.sinks,
                       window=kv.window) for name in EXACT for kv in [KVS[name]]}  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@torch.no_grad()
def test_any_passes_and_crops_are_those_of_the_stock_network(make_model, made, data):
    """What comes back into the window is what the codes stand for, on both sides."""
    networks, *rest = made(make_model, SAME[data.draw(st.sampled_from(EXACT))])
    model, stock = made_pair(networks, rest)
    known = torch.randint(64, (2, 0), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model, data.draw(st.sampled_from([4, 64])))
    coded = CodedCache(kv_path_of(stock), 2)
    for step in range(data.draw(st.integers(2, 6))):
        if known.shape[1] and data.draw(st.booleans()):
            less = data.draw(st.integers(1, min(known.shape[1], 12)))
            for kept in (cache, coded):
                kept.crop(-less)
            known = known[:, :-less]
        new = torch.randint(64, (2, data.draw(st.integers(1, 9))),
                            generator=torch.Generator().manual_seed(step))  # fmt: skip
        found, expected = (
            network(new, past_key_values=kept, use_cache=True).logits
            for network, kept in ((model, cache), (stock, coded))
        )
        assert_same(found, expected)
        known = torch.cat((known, new), 1)
        assert cache.get_seq_length() == coded.get_seq_length() == known.shape[1]


PAIRS = {}


def made_pair(networks, rest):
    if id(networks) not in PAIRS:
        stock = networks.integer(*rest, "torch")
        PAIRS[id(networks)] = networks, runtime(networks, *rest), stock
    return PAIRS[id(networks)][1:]


@torch.no_grad()
def test_generation_is_that_of_the_stock_network(make_model, made, ids, kv):
    """Greedy, by beams, and assisted: what an assistant got wrong is cropped away."""
    networks, *rest = made(make_model, kv)
    model, stock = made_pair(networks, rest)
    small = make_model(num_hidden_layers=1)
    for prompt, more in (
        (ids[:, :6], {}),
        (ids[:, :9], {"num_beams": 3}),
        (ids[:1, :1], {"num_beams": 2, "prefill_chunk_size": 2}),
        (ids[:1, :9], {"prefill_chunk_size": 4}),
    ):
        found, expected = (
            network.generate(prompt, max_new_tokens=12, **more, **GREEDY)
            for network in (model, stock)
        )
        assert torch.equal(found, expected)
    if kv in (BOTH, KVS["longer than the text"]):  # which code again what they had coded
        found, expected = (
            network.generate(ids[:1, :6], assistant_model=small, max_new_tokens=12, **GREEDY)
            for network in (model, stock)
        )
        assert torch.equal(found, expected)


@CHUNKS
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(make_model, made, ids, kv, queries, monkeypatch):
    """Every sequence of a padded batch has the logits and tokens that it has alone.

    Padding sees something, whatever kernels make of queries that see nothing.
    """

    def watched(*parts, attn_mask=None, **how):
        assert attn_mask is None or attn_mask.any(-1).all()
        return stock(*parts, attn_mask=attn_mask, **how)

    stock = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(history, "_QUERIES", queries)
    model = runtime(*made(make_model, kv))
    lengths = [11, 4]
    padded, mask = torch.zeros(2, 11, dtype=torch.int64), torch.zeros(2, 11, dtype=torch.int64)
    for i, n in enumerate(lengths):
        padded[i, 11 - n :], mask[i, 11 - n :] = ids[i, :n], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = [model(ids[i : i + 1, :n]).logits[0] for i, n in enumerate(lengths)]
    for sizes in ([11], [3, 8], [1] * 11, [9, 1, 1]):
        cache, begin, parts = new_cache(model, 9), 0, []
        for size in sizes:
            now = slice(begin, begin := begin + size)
            told = padded[:, now], mask[:, :begin], positions[:, now]
            parts.append(model(*told, past_key_values=cache).logits)
        found = torch.cat(parts, 1)
        assert found.isfinite().all()
        for row, n, expected in zip(found, lengths, alone, strict=True):
            assert_same(row[11 - n :], expected)
    settings = {"max_new_tokens": 9, **GREEDY}
    alone = [
        model.generate(p, attention_mask=torch.ones_like(p), **settings)[0, p.shape[1] :]
        for p in (ids[i : i + 1, :n] for i, n in enumerate(lengths))
    ]
    for more in ({}, {"prefill_chunk_size": 3}):
        found = model.generate(padded, attention_mask=mask, **more, **settings)[:, 11:]
        assert torch.equal(found, torch.stack(alone))


@torch.no_grad()
def test_a_mask_that_moves_sinks_is_refused(make_model, made, ids):
    for name, refused in (("both", True), ("window alone", False)):
        model, mask = runtime(*made(make_model, KVS[name])), torch.ones_like(ids[:, :9])
        cache = new_cache(model, 9)
        mask[1, :3] = 0
        model(ids[:, :3], mask[:, :3], past_key_values=cache)
        model(ids[:, 3:5], mask[:, :5], past_key_values=cache)  # a sequence that was padding begins
        moved = {"attention_mask": torch.ones_like(mask[:, :6]), "past_key_values": cache}
        if not refused:
            model(ids[:, 5:6], **moved)
            continue
        with pytest.raises(InputError, match="the attention mask moves the first tokens"):
            model(ids[:, 5:6], **moved)
        model(ids[:, 5:6], mask[:, :6], past_key_values=cache)


@torch.no_grad()
def test_sequences_take_their_floats_along(make_model, made, ids, kv):
    """Repeated, chosen, put in order, and grown; oracle: passes over the whole of each."""
    model = runtime(*made(make_model, kv))
    cache = new_cache(model, 9)
    model(ids[:, :9], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    order = torch.tensor([0, 1, 0])
    following = ids[order, 9:21].roll(1, 1)
    found = passes(model, following, [1, 1, 7, 3], cache)
    assert_same(found, model(torch.cat((ids[order, :9], following), 1)).logits[:, 9:])


@pytest.mark.parametrize("broken", ["norm", "layers.0.mlp"])
@torch.no_grad()
def test_a_pass_that_broke_off_is_one_that_was_cropped(make_model, made, ids, kv, broken):
    """Whether all layers had stored it or some; of one token it is none at all."""
    model = runtime(*made(make_model, kv))
    whole, caches = model(ids).logits, [new_cache(model, 24) for _ in range(3)]
    for cache in caches:
        model(ids[:, :14], past_key_values=cache)
    hook = decoder_of(model).get_submodule(broken).register_forward_hook(lambda *_: 1 / 0)
    for cache, new in zip(caches, (4, 1), strict=False):
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 14 : 14 + new].roll(1, 0), past_key_values=cache)
    hook.remove()
    model(ids[:, 14:18].roll(1, 0), past_key_values=caches[2])
    caches[2].crop(-4)
    first, alone, cropped = (passes(model, ids[:, 14:], [3, 1, 6], cache) for cache in caches)
    assert torch.equal(first, cropped)
    assert_same(alone, whole[:, 14:])


@torch.no_grad()
def test_slots_and_copies_bring_no_floats_of_others_along(make_model, made, ids, kv):
    model = runtime(*made(make_model, kv))
    expected, cache = model(ids).logits, new_cache(model, 64)
    model(ids, past_key_values=cache)
    slots = cache.slots
    for kept in slots.kept():
        kept.fill_(1e4)
    del cache
    cache = new_cache(model, 64)
    assert_same(passes(model, ids, [1, 3, *[1] * 9, 11], cache), expected)
    assert cache.slots is slots
    twin = copy.deepcopy(model)
    assert_same(passes(twin, ids, [9, 15], new_cache(twin, 24)), expected)


@pytest.mark.parametrize("eight", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("kept", [(2, 5), (3, 0), (0, 1)], ids=str)
@torch.no_grad()
def test_keys_whose_bias_is_apart_are_those_of_the_stock_network(
    make_family_model, made, ids, kept, eight, monkeypatch
):
    """Passes and chunks, told positions that skip, and behind padding, which stock sinks lack."""
    monkeypatch.setattr(history, "_QUERIES", 4)

    def make(*dtype):
        model = make_family_model("qwen2")
        for layer in map_of(model).layers:
            linear_at(model, layer.attention.keys).bias.data *= 300
        return model

    sides = [EIGHT if eight else FOUR] * 2
    networks, *rest = prepared(make, kv=KVConfig(*sides, sinks=kept[0], window=kept[1]))
    model, stock = runtime(networks, *rest), networks.integer(*rest, "torch")
    mask = torch.ones_like(ids)
    if not kept[0]:
        mask[0, :9] = 0
    positions = torch.stack(((torch.arange(24) - 9).clamp(min=0), torch.arange(24) * 3 + 5))
    for cuts in ([0, 24], [0, 5, 12, *range(13, 25)]):
        cache, coded, found, expected = (
            new_cache(model, 9),
            CodedCache(kv_path_of(stock), 2),
            [],
            [],
        )
        for begin, end in itertools.pairwise(cuts):
            told = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            part = ids[:, begin:end]
            found.append(model(part, past_key_values=cache, **told).logits)
            expected.append(stock(part, past_key_values=coded, use_cache=True, **told).logits)
        found, expected = (torch.cat(parts, 1)[mask.bool()] for parts in (found, expected))
        assert_same(found, expected)


@torch.no_grad()
def test_floats_are_counted_beside_all_codes(make_model, made, ids):
    """Bytes are those of tensors; bits count 16 a number, at the length that is asked for."""
    networks, *rest = made(make_model, BOTH)
    model = runtime(networks, *rest)
    cache = new_cache(model, 256)
    model(ids, past_key_values=cache)
    codes = 2 * 256 * 2 * 2 * 2 * 6  # layers, slots, sides, heads, bytes of 8 numbers
    assert cache.stored_bytes() == codes + 2 * 2 * 2 * 2 * 7 * 8 * 8  # 7 tokens of float64
    assert bits_of_cache(model, 56) == 6 + 16 * 7 / 56
    assert bits_of_cache(model, 56) > cache_bits(
        networks.parts(model, *rest).kv, map_of(model).dimensions, 56
    )
    some = runtime(*made(make_model, KVS["some layers"]))
    assert bits_of_cache(some, 56) == (16 + 6 + 16 * 7 / 56) / 2


def test_codecs_that_kernels_lack_are_named_with_their_window(make_model, made, caplog):
    with caplog.at_level(logging.WARNING):
        runtime(*made(make_model, KVS["in torch"]))
    assert "AffineCodec of 10 bits and AffineCodec of 6 bits" in caplog.text
