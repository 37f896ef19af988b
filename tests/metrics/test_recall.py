"""What a coded history does to attention, to long continuations, and to a number in a long text."""

import pytest
import torch

from spinlab.config import CodecConfig, EvalConfig, KVConfig
from spinlab.errors import InputError
from spinlab.kv.cache import attach_kv, kv_path_of
from spinlab.kv.path import kv_path
from spinlab.metrics import needle
from spinlab.metrics.attention import attention_errors
from spinlab.metrics.continuation import continuations, first_divergence
from spinlab.metrics.needle import found_needles
from spinlab.model.modules import decoder_of
from spinlab.rotation.online import hadamard_rotation

BIASED = {"attention_bias": True}
PATHS = {
    "rows": KVConfig(),
    "history": KVConfig(CodecConfig(codec="kivi", bits=2, run=3), CodecConfig(bits=2), window=4),
    "queries": KVConfig(queries=CodecConfig(bits=3)),
}


def coded(model, config, store=False):
    attach_kv(model, kv_path(config, 8, hadamard_rotation(8)), store)
    return model


def by_hand(path, query, keys, bias, values, scaling, cap=None, sinks=None):
    """Return the three errors of a layer, token by token; what is coded is written out."""
    history, squares, divergences, outputs = path.history(0), [], [], []
    turned, r3 = path.turn_queries(query), path.r3.dense()
    groups = query.shape[1] // keys.shape[1]
    for n in range(1, keys.shape[2] + 1):
        sides = [keys[:, :, :n].clone(), values[:, :, :n].clone()]
        end = history.sinks + history.coded(n)
        if end:
            for x, codec in zip(sides, path.sides(0), strict=True):
                x[:, :, :end] = codec.round(x[:, :, :end])
        k, v, exact_k, exact_v = (
            x.repeat_interleave(groups, 1)
            for x in (
                sides[0] + bias[:, :, :n],
                sides[1],
                (keys + bias)[:, :, :n],
                values[:, :, :n],
            )
        )
        s = (query[:, :, n - 1 : n] @ r3) @ exact_k.mT * scaling
        found = turned[:, :, n - 1 : n] @ k.mT * scaling
        if cap is not None:
            s, found = (cap * torch.tanh(x / cap) for x in (s, found))
        squares.append((found - s).square())
        if sinks is not None:  # as keys of their own, whose values are zero
            s, found = (torch.cat((x, sinks.view(1, -1, 1, 1)), -1) for x in (s, found))
            v, exact_v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (v, exact_v))
        p, q = s.softmax(-1), found.softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        outputs.append((q @ v - p @ exact_v, p @ exact_v))
    error, exact = (torch.cat(part, 2).square().sum() for part in zip(*outputs, strict=True))
    score = torch.cat([x.flatten() for x in squares]).mean()
    return score, torch.cat(divergences, 2).mean(), error / exact


def heads_of(model, ids):
    """Return queries, keys without and with the bias alone, and values, behind RoPE."""
    decoder, seen = decoder_of(model), {}
    attention = decoder.layers[0].self_attn
    parts = {n: getattr(attention, f"{n}_proj") for n in "qkv"} | {"rope": decoder.rotary_emb}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
        for name, module in parts.items()
    ]
    decoder(ids)
    for hook in hooks:
        hook.remove()
    cos, sin = (torch.cat((x, x), -1)[..., :8] for x in seen["rope"])  # of pairs, once or twice

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    q, k, v = (seen[name].unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
    b = torch.zeros_like(k)
    if attention.k_proj.bias is not None:
        b += attention.k_proj.bias.view(1, -1, 1, 8)
    return turn(q), turn(k - b), turn(b), v


@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma2", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8}),
        ("gemma2", {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, **BIASED}),
        ("gpt_oss", {"layer_types": ["full_attention"], "attention_bias": False}),
    ],
    ids=str,
)
@torch.no_grad()
def test_errors_of_attention_are_those_written_out(make_family_model, ids, config, family, changes):
    """Of the exact network's queries, keys and values; a bias that is apart is no error."""
    changes = {"num_hidden_layers": 1, **changes}
    stock = make_family_model(family, **changes)
    model = coded(make_family_model(family, **changes), config)
    path, expected, before = kv_path_of(model), [], model(ids).logits
    for row in ids:
        q, k, b, v = heads_of(stock, row[None])
        r3 = path.r3.dense()
        sinks = getattr(decoder_of(stock).layers[0].self_attn, "sinks", None)
        cap = changes.get("attn_logit_softcapping")
        expected.append(by_hand(path, q, k @ r3, b @ r3, v, 8**-0.5, cap, sinks))
    square, *others = (torch.stack(x).mean().item() for x in zip(*expected, strict=True))
    found = attention_errors(model, ids)
    assert [*found.values()] == pytest.approx([square**0.5, *others], rel=1e-4)
    assert torch.equal(model(ids).logits, before)  # and the model is as it was


def test_first_divergence_counts_what_comes_before_it():
    original = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 9, 4], [7, 2, 3, 4], [1, 2, 3, 4]])
    assert first_divergence(original, other) == (2 + 0 + 4) / 3


@torch.no_grad()
def test_continuations_are_those_of_whole_passes(make_model, ids):
    """Of the original, and of a network that stores nothing by itself."""
    plain, network = make_model(torch.float32), coded(make_model(torch.float32), PATHS["history"])
    for model in (plain, network):
        expected = ids[:, :9]
        for _ in range(7):
            following = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat((expected, following), 1)
        assert torch.equal(continuations(model, ids[:, :9], 7), expected[:, 9:])


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


def test_texts_have_their_length_and_say_the_number_once(monkeypatch):
    asked = []

    def answer(model, requests, batch, longest):
        asked.extend(requests)
        return [(-2.0, index % 4 > 0) for index, _ in enumerate(requests)]

    monkeypatch.setattr(needle, "likelihoods", answer)
    found = found_needles(None, Bytes(), 300, 8, torch.Generator().manual_seed(0))
    error = (0.75 * 0.25 / 20) ** 0.5
    assert found == {"needle/300": 0.75, "needle_stderr/300": error, "needle_nats/300": 2.0}
    places = []
    for _, prompt, number in asked:
        text, number = bytes(prompt).decode(), bytes(number).decode()
        assert len(prompt) + len(number.encode()) == 300
        assert text.count(number) == 1 and text.endswith(" is") and number.strip().isdigit()
        places.append(text.index(number))
    assert len({bytes(answer) for _, _, answer in asked}) == len(asked) == 20
    assert places[0] < 100 and places[-1] > 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"continued": 64, "window": 64}, "eval.continued=64 is out of range"),
        ({"continued": 4, "paired": False}, "eval.continued compares with the original"),
        ({"attention": 1, "variants": ["fp"]}, "eval.attention is measured of fake"),
        ({"needle": [8]}, "eval.needle=8 must be at least 64"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        EvalConfig(**settings)
