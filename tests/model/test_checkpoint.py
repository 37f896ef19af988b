"""What identifies a checkpoint, what its settings may say, and what its tokenizer may not."""

import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.load import (
    check_model,
    describe_model,
    load_model,
    load_tokenizer,
    meta_model,
    source_digest,
    tokenizer_digest,
)

PARAMETERS = 256 * 24 * 2 + 2 * (24 * 64 + 32 * 24 + 3 * 24 * 40 + 2 * 24) + 24


def local(folder) -> ModelConfig:
    return ModelConfig(weights="pretrained", path=str(folder))


def described(config: ModelConfig) -> dict:
    return describe_model(config, meta_model(config, None))


def settings_refusal(folder, change_json, changes) -> str:
    change_json(folder / "config.json", lambda settings: settings.update(changes))
    with pytest.raises(InputError) as mistake:
        check_model(local(folder))
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


# identity ----------------------------------------------------------------------------------------


def test_the_same_files_elsewhere_are_the_same_model(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "another name")
    assert source_digest(local(moved)) == source_digest(local(folder))
    assert tokenizer_digest(local(moved)) == tokenizer_digest(local(folder))
    assert str(tmp_path) not in json.dumps([source_digest(local(moved)), described(local(moved))])


@pytest.mark.parametrize(
    ("name", "counts"), [("config.json", True), ("generation_config.json", False)]
)
def test_the_settings_that_change_numbers_are_in_the_digest(folder, name, counts):
    before = source_digest(local(folder)), tokenizer_digest(local(folder))
    with (folder / name).open("a") as file:
        file.write("\n")
    assert (source_digest(local(folder)) != before[0]) == counts
    assert tokenizer_digest(local(folder)) == before[1]


def test_another_tokenizer_is_no_other_model(folder, change_json):
    before = source_digest(local(folder)), tokenizer_digest(local(folder))
    change_json(folder / "tokenizer.json", lambda settings: settings.update(truncation=None, a=1))
    assert source_digest(local(folder)) == before[0]
    assert tokenizer_digest(local(folder)) != before[1]


def test_what_is_not_read_is_not_in_the_digest(folder):
    before = source_digest(local(folder)), tokenizer_digest(local(folder))
    for name in ("README.md", "notes.txt", "pytorch_model.bin", "other.safetensors", "eval.json"):
        (folder / name).write_text("of no matter")
    assert (source_digest(local(folder)), tokenizer_digest(local(folder))) == before


def test_every_shard_is_in_the_digest(tmp_path, save_checkpoint):
    save_checkpoint(tmp_path, size="40KB")
    names = {file.name for file in tmp_path.glob("model*.safetensors")}
    assert len(names) > 1
    assert names < source_digest(local(tmp_path)).keys()


def test_a_description_counts_what_runs_and_names_no_path(folder):
    found = described(local(folder))
    assert found["source"] == {"folder": "checkpoint"}
    assert (found["family"], found["parameters"]) == ("llama", PARAMETERS)
    expected = {"hidden": 24, "head_dim": 8, "intermediate": 40, "layers": 2, "heads": 4}
    assert expected.items() <= found.items()
    shape = {"vocab_size": 64, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    random = described(ModelConfig(architecture={**shape, "intermediate_size": 8}))
    assert random["source"] == {"random": "seeded weights"}
    assert random["vocabulary"] == 64


# settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["llama"]}, "names no model family"),
        ({"model_type": "gpt2"}, "'gpt2' cannot be rotated"),
        ({"rope_parameters": {"rope_type": "moebius", "rope_theta": 1e4}}, "lacks moebius"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"hidden_act": "nonsense"}, "lacks nonsense"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000 is out of range"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is out of range"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be positive"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 must be positive"),
        ({"num_attention_heads": 3}, "num_key_value_heads=2 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be positive"),
        ({"head_dim": 7}, "head_dim"),
        ({"intermediate_size": 41}, "of shape (24, 40) for (24, 41)"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' expected float"),
        ({"pad_token_id": 999}, "Padding_idx"),
        ({"id2label": 3}, "config.json: "),
        ({"to_dict": 3}, "makes no model of it"),
        ({"cls": 3}, "makes no model of it"),
        ({"quantization_config": {"quant_method": "awq"}}, "stored quantized (awq)"),
        ({"quantization_config": [1]}, "stored quantized (unnamed method)"),
    ],
    ids=str,
)
def test_hostile_settings_are_one_sentence(folder, change_json, changes, words):
    assert words in settings_refusal(folder, change_json, changes)


def test_a_head_width_that_the_family_needs_is_asked_for(tmp_path, save_checkpoint, change_json):
    save_checkpoint(tmp_path, model_type="qwen3")
    assert "'head_dim' expected int" in settings_refusal(tmp_path, change_json, {"head_dim": None})


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_9"},
        {"_attn_implementation": "eager"},
        {"transformers_weights": "../elsewhere.safetensors"},
        {"dtype": "int8", "torch_dtype": "nonsense"},
        {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
    ],
    ids=str,
)
def test_code_files_and_numerics_are_ours_to_say(folder, change_json, changes):
    expected = load_model(local(folder), None, 0)
    change_json(folder / "config.json", lambda settings: settings.update(changes))
    assert source_digest(local(folder))
    found = load_model(local(folder), None, 0)
    assert found.config._attn_implementation == "sdpa"
    assert found.dtype == torch.float32
    ids = torch.arange(16)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


# tokenizers --------------------------------------------------------------------------------------


def larger(folder) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, "w0"))
    ).save_pretrained(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    larger(folder)
    with pytest.raises(InputError, match="last token is 299 and vocab_size=256"):
        load_tokenizer(local(folder), None)


def test_a_tokenizer_that_lost_its_merges_is_refused(folder):
    """As a version of transformers reads those of some packaged files: letter by letter."""
    vocabulary = {token: n for n, token in enumerate(["t", "h", "e", "i", "th", "the", "hit"])}
    merges = [("t", "h"), ("th", "e"), ("h", "it"), ("i", "t")]
    vocabulary["it"] = len(vocabulary)
    for kept in (merges, []):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=kept))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        if kept:
            assert load_tokenizer(local(folder), None).tokenize("thehit") == ["the", "hit"]
            continue
        with pytest.raises(InputError, match=r"cuts words into letters \(the, hit are tokens"):
            load_tokenizer(local(folder), None)


def test_a_vocabulary_larger_than_the_tokenizer_is_usual(tmp_path, save_checkpoint):
    save_checkpoint(tmp_path, vocab_size=320)
    assert len(load_tokenizer(local(tmp_path), None)) == 256
    larger(tmp_path)
    assert len(load_tokenizer(local(tmp_path), None)) == 300


def test_bytes_need_a_vocabulary_of_their_number():
    shape = {"vocab_size": 200, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="last token is 255 and vocab_size=200"):
        load_tokenizer(ModelConfig(architecture={**shape, "intermediate_size": 8}), None)


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"[]", b'{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizer_are_one_sentence(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer cannot be read") as mistake:
        load_tokenizer(local(folder), None)
    assert "\n" not in str(mistake.value)


def test_foreign_code_of_a_tokenizer_neither_runs_nor_is_asked_about(folder, monkeypatch):
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Words: pass\n"
    (folder / "words.py").write_text(code)
    settings = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["words.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(sys, "stdin", None)
    try:
        load_tokenizer(local(folder), None)  # as the family's own, where transformers has one
    except InputError as error:
        assert "foreign code is not run" in str(error)
    assert not ran.exists()
