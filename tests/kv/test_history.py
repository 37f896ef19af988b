"""Sinks, a window and runs: what a token sees is the same however the tokens came."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from spinlab.config import CodecConfig, KVConfig, KVOverride, LloydMaxConfig, QJLConfig
from spinlab.config.kv import CodecChange
from spinlab.errors import InputError
from spinlab.kv.bits import cache_bytes
from spinlab.kv.cache import CodedCache, attach_kv, kv_path_of
from spinlab.kv.history import History, PassMasks
from spinlab.kv.path import kv_path
from spinlab.model.modules import map_of
from spinlab.rotation.online import hadamard_rotation

AFFINE, OFF = CodecConfig(bits=2), CodecConfig(bits=16)
LLOYD = CodecConfig(codec="lloyd_max", bits=2)
KIVI = CodecConfig(codec="kivi", bits=2, run=3)
QJL = CodecConfig(codec="qjl", bits=2, run=4, qjl=QJLConfig(outliers=2))
RESIDUAL = CodecConfig(codec="lloyd_max", bits=3, lloyd_max=LloydMaxConfig(residual=True))
PATHS = {
    "affine": KVConfig(AFFINE, AFFINE),
    "affine in a window": KVConfig(AFFINE, AFFINE, sinks=2, window=4),
    "lloyd_max": KVConfig(LLOYD, LLOYD),
    "product form": KVConfig(RESIDUAL, LLOYD, sinks=1),
    "kivi": KVConfig(KIVI, AFFINE),
    "kivi in a window": KVConfig(KIVI, AFFINE, sinks=1, window=5),
    "two runs": KVConfig(QJL, KIVI),
    "qjl": KVConfig(QJL, AFFINE, window=3),
    "values alone": KVConfig(OFF, AFFINE, window=2),
    "keys alone": KVConfig(KIVI, OFF),
}


@pytest.fixture(params=PATHS)
def config(request):
    return PATHS[request.param]


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(path, query, keys, values):
    """Attend token by token: each to floats of what is not coded once it is there."""
    history, found = path.history(0), []
    for n in range(1, keys.shape[2] + 1):
        end = history.sinks + history.coded(n)
        seen = []
        for x, codec in zip((keys, values), path.sides(0), strict=True):
            part = x[:, :, :n].clone()
            due = part[:, :, history.sinks : end]
            if codec is not None and due.numel():
                part[:, :, history.sinks : end] = codec.round(due)
            seen.append(part)
        found.append(scaled_dot_product_attention(query[:, :, n - 1 : n], *seen))
    return torch.cat(found, 2)


def attended(path, layer_pass, query, keys, values, past):
    new = query.shape[2]
    found = layer_pass(keys, values)
    seen = torch.ones(new, past + new).tril(past).bool()[None, None]
    mask = path.history(0).mask(seen, new, torch.device("cpu"))
    return scaled_dot_product_attention(query, *found, attn_mask=mask)


def test_one_pass_and_any_chunks_are_token_by_token(config):
    """Oracle: attention written out, one query at a time."""
    path, tokens = kv_path(config, 8), 23
    query, keys, values = rows(3, 2, 2, tokens, 8)
    expected = by_hand(path, query, keys, values)
    whole = attended(path, path.new_layer().round, query, keys, values, 0)
    assert torch.allclose(whole, expected, atol=1e-10)
    for sizes in ([tokens], [1] * tokens, [1, 7, 0 + 2, 9, 1, 3], [22, 1]):
        layer, past = path.new_layer(), 0
        for part in zip(*(x.split(sizes, 2) for x in (query, keys, values)), strict=True):
            found = attended(path, layer.append, *part, past)
            now = slice(past, past + part[0].shape[2])
            assert torch.allclose(found, expected[:, :, now], atol=1e-10)
            past = now.stop
            assert (layer.tokens, layer.sequences) == (past, 2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_layers_change_as_recomputation_does(data):
    """Of any appends, crops into the floats, reorderings and resets; oracle: a layer made anew."""
    path = kv_path(data.draw(st.sampled_from(list(PATHS.values()))), 8)
    history, layer, known = path.history(0), path.new_layer(), rows(2, 2, 2, 0, 8)
    for step in range(data.draw(st.integers(1, 6))):
        act = data.draw(st.sampled_from(["append", "append", "crop", "reorder", "reset"]))
        tokens = known.shape[3]
        if act == "append":
            new = rows(2, known.shape[1], 2, data.draw(st.integers(1, 9)), 8, seed=step)
            known = torch.cat((known, new), 3)
            layer.append(*new)
        elif act == "crop" and tokens:
            keep = data.draw(st.integers(1, tokens))
            if history.twice(0, 99) != slice(0, 0) and history.coded(keep) < history.coded(tokens):
                keep = tokens  # what was coded could not be floats again
            layer.crop(keep)
            known = known[:, :, :, :keep]
        elif act == "reorder" and tokens:
            order = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=3)))
            order = order.clamp(max=known.shape[1] - 1)
            layer.reorder(order)
            known = known[:, order]
        elif act == "reset":
            layer.reset()
            known = known[:, :, :, :0]
    again = path.new_layer()
    if known.shape[3]:
        again.append(*known)
    new = rows(2, known.shape[1], 2, 5, 8, seed=99)
    assert (layer.tokens, layer.bytes) == (again.tokens, again.bytes)
    for found, expected in zip(layer.append(*new), again.append(*new), strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_what_was_coded_and_is_cropped_into_is_what_the_codes_stand_for(config):
    path = kv_path(config, 8)
    history, layer, known = path.history(0), path.new_layer(), rows(2, 2, 2, 23, 8)
    whole = [x[:, :, :23] for x in layer.append(*known)]
    for keep in (19, 14, 5, 1):
        layer.crop(keep)
        assert layer.tokens == keep and layer.bytes == sum(
            2 * 2 * n
            for n in (
                (history.coded(keep) // codec.run * codec.row_bytes if codec else 0)
                + 64 * (keep - (history.coded(keep) if codec else 0))
                for codec in path.sides(0)
            )
        )
    for found, before in zip(layer.append(*rows(2, 2, 2, 1, 8)), whole, strict=True):
        if history.coded(2) == 0:
            assert torch.equal(found[:, :, :1], before[:, :, :1])


def test_gradients_pass_straight_through(config):
    path = kv_path(config, 8)
    keys, values = (x.requires_grad_() for x in rows(2, 1, 2, 11, 8))
    found = path.new_layer().round(keys, values)
    weights = [torch.ones_like(x) for x in found]
    for x, y, weight in zip((keys, values), found, weights, strict=True):
        (gradient,) = torch.autograd.grad(y, x, weight)
        twice = path.history(0).twice(0, 11)
        expected = torch.ones_like(x)
        expected[:, :, twice] += 1
        assert torch.equal(gradient, expected)


# in models ----------------------------------------------------------------------------------------


def coded(model, config, store=True):
    names = map_of(model).attentions
    attach_kv(model, kv_path(config, 8, hadamard_rotation(8), layers=names), store)
    return model


@torch.no_grad()
def test_decoding_in_chunks_equals_one_pass(make_model, ids, config):
    model, whole = coded(make_model(), config), coded(make_model(), config, store=False)
    expected, cache = whole(ids).logits, CodedCache(kv_path_of(model), 2)
    assert torch.allclose(model(ids).logits, expected, atol=1e-9)
    sizes = [5, 1, 1, 6, 1]
    sizes.append(ids.shape[1] - sum(sizes))
    steps = [model(p, past_key_values=cache, use_cache=True).logits for p in ids.split(sizes, 1)]
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-9)
    cache.crop(-1)
    again = model(ids[:, -1:], past_key_values=cache).logits
    if not kv_path_of(model).counts:
        assert torch.allclose(again, expected[:, -1:], atol=1e-9)


SLIDES = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("family", "cap"), [("gemma2", {"attn_logit_softcapping": 1.5}), ("gemma3_text", {})]
)
@torch.no_grad()
def test_soft_caps_and_windows_are_the_same_token_by_token(
    make_family_model, ids, config, family, cap
):
    """One pass against steps, which see no token twice; caps and windows change what is seen."""

    def made(store=True, **changes):
        return coded(make_family_model(family, **{**cap, **SLIDES, **changes}), config, store)

    expected, model = made(store=False)(ids).logits, made()
    cache = CodedCache(kv_path_of(model), 2)
    sizes = [5, *[1] * (ids.shape[1] - 5)]
    steps = [model(p, past_key_values=cache, use_cache=True).logits for p in ids.split(sizes, 1)]
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-9)
    for change in ({"sliding_window": 64}, {name: None for name in cap}):
        if change:
            assert not torch.allclose(made(store=False, **change)(ids).logits, expected, atol=1e-3)


@torch.no_grad()
def test_beams_and_single_tokens_are_served(make_model, ids, config):
    model = coded(make_model(torch.float32), config)
    settings = dict(do_sample=False, pad_token_id=0, max_new_tokens=6)
    for prompt in (ids[:1, :1], ids[:, :9]):
        beams = model.generate(prompt, num_beams=3, **settings)
        assert beams.shape == (len(prompt), prompt.shape[1] + 6)
    whole, prompt = coded(make_model(torch.float32), config, store=False), ids[:1, :5]
    found = model.generate(prompt, **settings)
    for _ in range(6):
        prompt = torch.cat((prompt, whole(prompt).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, prompt)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing_or_is_refused(make_model, ids, config):
    model = coded(make_model(), config)
    mask = torch.cat((torch.zeros(1, 3), torch.ones(1, 12)), 1).long()
    padded, positions = torch.cat((ids[:1, :3], ids[:1, :12]), 1), (mask.cumsum(1) - 1).clamp(min=0)
    told = dict(attention_mask=mask, position_ids=positions)
    if kv_path_of(model).counts:
        with pytest.raises(InputError, match="counts sinks and runs of tokens from the first slot"):
            model(padded, **told)
        return
    assert torch.allclose(model(padded, **told).logits[:, 3:], model(ids[:1, :12]).logits)


@torch.no_grad()
def test_a_filled_cache_takes_the_bytes_that_are_counted(make_family_model, config):
    """Also with the positions of biases that are apart; numbers of 16 bits."""
    for family in ("llama", "qwen2"):
        model = coded(make_family_model(family).bfloat16(), config)
        cache, path = CodedCache(kv_path_of(model), 2), kv_path_of(model)
        for tokens in (7, 12, 30):
            new = torch.zeros(1, tokens - cache.get_seq_length(), dtype=torch.long)
            model(new, past_key_values=cache, use_cache=True)
            assert cache.stored_bytes() == cache_bytes(path, map_of(model).dimensions, tokens)
        cache.crop(-18)
        assert cache.stored_bytes() == cache_bytes(path, map_of(model).dimensions, 12)
        cache.reset()
        assert cache.stored_bytes() == 0


@torch.no_grad()
def test_layers_have_codecs_of_their_own(make_model, ids):
    """Oracle: a layer's answer to the codec that a pattern gives it."""
    change = KVOverride("*.layers.1.*", CodecChange(bits=8), CodecChange(codec="lloyd_max"))
    model = coded(make_model(torch.float32), KVConfig(OFF, AFFINE, overrides=[change]))
    path = kv_path_of(model)
    assert path.sides(0).keys is None and path.sides(0).values.grid.bits == 2
    assert path.sides(1).keys.grid.bits == 8 and path.sides(1).values.level_bits == 2
    cache = CodedCache(path, 2)
    model(ids, past_key_values=cache, use_cache=True)
    kept = [layer.kept for layer in cache.layers]
    assert [k.keys.dtype for k in kept] == [torch.float32, torch.uint8]
    assert [k.values.shape[-1] for k in kept] == [2 + 3, 2 + 2]


@pytest.mark.parametrize(
    ("settings", "exact"), [({"first_layers": 1}, [0]), ({"last_layers": 2}, [0, 1])], ids=str
)
def test_first_and_last_layers_stay_in_16_bits(make_model, settings, exact):
    path = kv_path(KVConfig(window=4, **settings), 8, layers=map_of(make_model()).attentions)
    assert [n for n in (0, 1) if path.sides(n) == (None, None)] == exact
    assert [path.history(n) for n in exact] == [History()] * len(exact)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"first_layers": 3}, "kv.first_layers=3 is more than the 2 layers of the model"),
        ({"overrides": [KVOverride("*.7.*", CodecChange(bits=8))]}, "'\\*.7.\\*' matches no att"),
    ],
)
def test_layers_that_are_not_there_are_refused(make_model, settings, words):
    with pytest.raises(InputError, match=words):
        kv_path(KVConfig(**settings), 8, layers=map_of(make_model()).attentions)


@torch.no_grad()
def test_layers_of_equal_histories_share_a_mask_for_one_pass(make_model, ids, monkeypatch):
    """Whatever the passes see: they are those of layers that ask by themselves."""
    config = KVConfig(AFFINE, AFFINE, sinks=1, window=3)
    model, made, mask = coded(make_model(torch.float32), config), [], History.mask

    def counted(self, *parts):
        made.append(weakref.ref(found := mask(self, *parts)))
        return found

    monkeypatch.setattr(History, "mask", counted)
    padded = torch.ones_like(ids)
    padded[1, -2:] = 0
    asked = [{}, {"attention_mask": padded}, {}]
    found = [model(ids, **more).logits for more in asked]
    assert len(made) == len(asked) and len(kv_path_of(model).histories) == 1
    assert all(held() is None for held in made)  # it goes with its pass
    monkeypatch.setattr(PassMasks, "of", lambda masks, history, *parts: mask(history, *parts))
    for more, logits in zip(asked, found, strict=True):
        assert torch.equal(model(ids, **more).logits, logits)
    again = copy.deepcopy(model)
    first, other = (m.model.layers[0].self_attn.kv_masks for m in (model, again))
    assert first is model.model.layers[1].self_attn.kv_masks is not other
    assert other is again.model.layers[1].self_attn.kv_masks


def test_an_override_that_changes_nothing_is_refused():
    with pytest.raises(InputError, match=r"kv.overrides\[\*\] changes nothing"):
        KVOverride("*")


def test_a_model_is_coded_once(make_model):
    model = coded(make_model(), KVConfig())
    with pytest.raises(InputError, match="cache is coded already"):
        coded(model, KVConfig())
