"""Tokenizers in GGUF: read back they make the same tokens, and none is taken for another."""

import json

import gguf
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spinlab.errors import InputError
from spinlab.export.gguf import write
from spinlab.export.gguf.tokens import vocabulary_of
from spinlab.model.bytes import byte_tokenizer

BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"]


def fields(file) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama", "bytes"])
def test_a_tokenizer_reads_back_as_it_was(
    make_subject, make_settings, make_tokenizer, sample, tmp_path, name
):
    tokenizer = byte_tokenizer() if name == "bytes" else make_tokenizer(name)
    path = str(tmp_path / "m.gguf")
    rows = len(tokenizer) + (0 if name == "bytes" else 5)
    write(make_subject(make_settings("f16", path, vocab_size=rows), tokenizer), path)
    found, told = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), fields(path)
    assert told["tokenizer.ggml.model"] == ("llama" if name == "llama" else "gpt2")
    if name in BYTE_LEVEL:
        assert told["tokenizer.ggml.pre"] == name
    for text in (sample, *sample.split("\n"), "", "1234 it's"):
        bare = {"add_special_tokens": False}
        assert found(text, **bare).input_ids == tokenizer(text, **bare).input_ids
        assert found(text).input_ids == tokenizer(text).input_ids
    ids = tokenizer(sample).input_ids
    assert found.decode(ids) == tokenizer.decode(ids)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, token) == getattr(tokenizer, token)
    assert found.chat_template == tokenizer.chat_template


def test_rows_without_a_token_are_unused(make_tokenizer):
    tokenizer = make_tokenizer("gpt-2")
    full = vocabulary_of("s", tokenizer, len(tokenizer))
    more = vocabulary_of("s", tokenizer, len(tokenizer) + 3)
    assert more.tokens[: len(tokenizer)] == full.tokens
    assert more.tokens[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert more.types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert full.types[full.tokens.index("<s>")] == gguf.TokenType.CONTROL
    assert full.types[full.tokens.index("<own>")] == gguf.TokenType.USER_DEFINED
    fewer = vocabulary_of("s", tokenizer, len(tokenizer) - 3)  # what was added lies beyond
    assert fewer.tokens == full.tokens[:-3]
    assert "ggml.bos_token_id" not in fewer.settings


def test_bytes_and_the_unknown_of_sentencepiece_have_types_of_their_own(make_tokenizer):
    vocabulary = vocabulary_of("s", tokenizer := make_tokenizer("llama"), 2 * 256)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<0x0A>"] == gguf.TokenType.BYTE
    assert types["<unk>"] == gguf.TokenType.UNKNOWN
    assert types["<s>"] == gguf.TokenType.CONTROL
    assert vocabulary.settings["ggml.add_space_prefix"] is True
    assert tokenizer.unk_token == "<unk>"


def test_what_a_text_is_given_is_among_the_settings(make_tokenizer):
    for name, first in (("gpt-2", False), ("llama-bpe", True), ("llama", True)):
        settings = vocabulary_of("s", make_tokenizer(name), 600).settings
        assert (settings["ggml.add_bos_token"], settings["ggml.add_eos_token"]) == (first, False)


def altered(tokenizer: PreTrainedTokenizerFast, **changes) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose definition differs."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            definition[part][key] = value
        else:
            definition[part] = value
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt-2", {"pre_tokenizer": {"type": "Whitespace"}}, "none of gpt-2, smollm, llama-bpe"),
        ("gpt-2", {"pre_tokenizer__add_prefix_space": True}, "none of gpt-2"),
        ("gpt-2", {"normalizer": {"type": "NFC"}}, "none of gpt-2"),
        ("qwen2", {"normalizer": {"type": "Lowercase"}}, "none of gpt-2"),
        ("qwen2", {"model__ignore_merges": True}, "none of gpt-2"),
        ("llama", {"normalizer": {"type": "NFKC"}}, "prepares texts otherwise"),
        (
            "gpt-2",
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            "WordLevel",
        ),
    ],
    ids=["words", "prefix", "nfc", "lower", "whole", "nfkc", "kind"],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(make_tokenizer, name, changes, message):
    with pytest.raises(InputError, match=message):
        vocabulary_of("export.gguf=m", altered(make_tokenizer(name), **changes), 600)


def test_merges_that_no_scores_order_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("llama")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    a, b, c = "abc"
    vocab = {**model["vocab"]}
    for text in ("a", "b", "c", "ab", "bc", "abc", "cc"):
        vocab.setdefault(text, len(vocab))
    plain = {"added_tokens": [], "post_processor": None}
    merges = [[a, b], [b, c], ["ab", c], [c, c], [a, "bc"]]
    changed = altered(tokenizer, model__vocab=vocab, model__merges=merges, **plain)
    with pytest.raises(InputError, match="merges are in no order that scores of tokens could make"):
        vocabulary_of("export.gguf=m", changed, 600)


def test_what_else_a_text_is_given_is_refused(make_tokenizer):
    twice = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2
        + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    with pytest.raises(InputError, match="adds more to a text than its first and last token"):
        tokenizer = altered(make_tokenizer("gpt-2"), post_processor=twice)
        vocabulary_of("export.gguf=m", tokenizer, 600)
