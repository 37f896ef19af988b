"""Packaged GGUF files: converted whole and finite, or refused."""

import gguf
import numpy as np
import pytest
import torch

import spinlab.model.gguf
import spinlab.model.load
from spinlab.config import Config, ModelConfig, PathsConfig
from spinlab.errors import InputError
from spinlab.model.gguf import convert_gguf
from spinlab.model.load import describe_model, load_model, load_tokenizer, meta_model, source_digest
from spinlab.stages.pipeline import Pipeline

HIDDEN, INNER, WORDS = 16, 24, 40
CONFIG = ModelConfig(weights="pretrained", package="carrier", file="tiny.gguf")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A Llama of one layer, in the place of an installed package's file."""
    path = tmp_path / "tiny.gguf"
    monkeypatch.setattr(spinlab.model.gguf, "packaged_file", lambda package, name: tmp_path / name)
    write(path, tensors())
    return path


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    square = ("attn_q", "attn_k", "attn_v", "attn_output")
    shapes = {f"blk.0.{name}.weight": (HIDDEN, HIDDEN) for name in square}
    shapes |= {f"blk.0.{name}.weight": (INNER, HIDDEN) for name in ("ffn_gate", "ffn_up")}
    shapes |= {"blk.0.ffn_down.weight": (HIDDEN, INNER), "token_embd.weight": (WORDS, HIDDEN)}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    shapes |= {name: (HIDDEN,) for name in norms}
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write(path, weights: dict[str, np.ndarray], family: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "0", "w0", "ww", "<|end|>", *(f"x{i}" for i in range(WORDS - 5))])
    writer.add_token_merges(["w 0", "w w"])
    writer.add_eos_token_id(4)
    writer.add_bos_token_id(4)
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refusal(tmp_path) -> str:
    with pytest.raises(InputError) as mistake:
        convert_gguf(CONFIG, tmp_path / "out")
    assert "\n" not in str(mistake.value)
    assert "tiny.gguf of carrier" in str(mistake.value)
    return str(mistake.value)


def test_a_whole_file_becomes_an_ordinary_checkpoint(file, tmp_path):
    convert_gguf(CONFIG, tmp_path / "out")
    model = load_model(CONFIG, tmp_path / "out", 0)
    embedding = torch.from_numpy(tensors()["token_embd.weight"])
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert load_tokenizer(CONFIG, tmp_path / "out").get_vocab()["w0"] == 2
    described = {n: t.shape for n, t in meta_model(CONFIG, None).state_dict().items()}
    assert described == {n: t.shape for n, t in model.state_dict().items()}
    assert describe_model(CONFIG, meta_model(CONFIG, None))["source"] == {
        "package": "carrier",
        "file": "tiny.gguf",
    }


@pytest.mark.parametrize("size", [0, 3, 4, 20, 200, 900, 0.5, -8])
def test_a_cut_file_is_one_sentence(file, tmp_path, size):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(size * len(whole)) if isinstance(size, float) else size])
    assert "GGUF" in refusal(tmp_path)


def test_another_kind_of_file_is_told_so(file, tmp_path):
    file.write_bytes(b"PK" + file.read_bytes()[2:])
    assert "is no GGUF file" in refusal(tmp_path)


def test_a_missing_tensor_is_named(file, tmp_path):
    weights = tensors()
    del weights["blk.0.ffn_norm.weight"]
    write(file, weights)
    assert "lacks model.layers.0.post_attention_layernorm.weight" in refusal(tmp_path)


def test_numbers_that_are_none_are_found(file, tmp_path):
    weights = tensors()
    weights["blk.0.ffn_up.weight"][3, 5] = np.inf
    write(file, weights)
    assert "model.layers.0.mlp.up_proj.weight holds NaN or infinity" in refusal(tmp_path)


def test_another_family_is_refused_before_it_is_read(file, tmp_path):
    write(file, tensors(), "starcoder2")
    with pytest.raises(InputError, match="'starcoder2' cannot be rotated"):
        convert_gguf(CONFIG, tmp_path / "out")


def test_metadata_are_read_from_the_file_only_until_it_is_converted(file, tmp_path, monkeypatch):
    config = Config(model=CONFIG, paths=PathsConfig(cache=str(tmp_path / "cache")))
    before = Pipeline(config)
    sizes = {name: tuple(p.shape) for name, p in before.original.shape.named_parameters()}
    assert before.original.converted
    monkeypatch.setattr(spinlab.model.load, "gguf_config", None)
    after = Pipeline(config)
    assert {name: tuple(p.shape) for name, p in after.original.shape.named_parameters()} == sizes
    assert after.original.identity == before.original.identity


def test_changed_bytes_are_another_model(file):
    before = source_digest(CONFIG)
    write(file, {**tensors(), "output_norm.weight": np.ones(HIDDEN, np.float32)})
    assert source_digest(CONFIG) != before
