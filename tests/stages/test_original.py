"""Which model a run starts from, what is looked at first, and what the text's tokens depend on."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spinlab.compose import composed
from spinlab.config import Config, DataConfig, EvalConfig, ModelConfig, PathsConfig
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.checkpoint import Checkpoint
from spinlab.model.random import random_model
from spinlab.stages.pipeline import Pipeline

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(name: str, seed: int = 0) -> Path:
        random_model(ModelConfig(architecture=SHAPE), seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def make_sources(tmp_path):
    (tmp_path / "text.txt").write_text("A sentence of some length. " * 200)
    text = str(tmp_path / "text.txt")

    def make(**model) -> Pipeline:
        return Pipeline(
            Config(
                model=ModelConfig(**model),
                data=DataConfig(text, [text]),
                eval=EvalConfig(window=32),
                paths=PathsConfig(cache=str(tmp_path / "cache"), runs=str(tmp_path / "runs")),
            )
        )

    return make


def test_a_checkpoint_is_held_against_its_config_once(make_checkpoint, make_sources, monkeypatch):
    calls = []
    monkeypatch.setattr(Checkpoint, "check", lambda self: calls.append(self.place))
    sources = make_sources(weights="pretrained", path=str(make_checkpoint("a")))
    assert sources.original.identity
    assert sources.original.shape
    assert len(calls) == 1


# the choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, "random"),
        ({"path": "/a/folder"}, "pretrained"),
        ({"hub": "a/b"}, "pretrained"),
        ({"package": "a", "file": "b.gguf"}, "pretrained"),
        ({"hub": "a/b", "weights": "random"}, "random"),  # a preset's shape without its weights
    ],
    ids=str,
)
def test_weights_are_random_only_where_no_model_is_named(given, weights):
    assert ModelConfig(**given).weights == weights


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "/a", "weights": "random"}, "model.path=/a and model.weights=random name two"),
        ({"weights": "pretrained"}, "no model is named"),
        ({"hub": "a/b", "package": "c", "file": "d"}, "name two models"),
        ({"package": "c"}, "model.package=c needs model.file"),
        ({"outlier_channels": -1}, "outlier_channels=-1 must be at least 0"),
        ({"outlier_scale": 0.0}, "outlier_scale=0.0 must be positive"),
    ],
    ids=str,
)
def test_sources_that_exclude_each_other_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        ModelConfig(**given)


def test_a_folder_given_to_the_toy_is_what_runs():
    named = composed("+experiment=toy", "model.path=/a/folder").model
    assert (named.weights, named.path) == ("pretrained", "/a/folder")
    assert composed("+experiment=toy", "model=random").model.weights == "random"
    preset = composed("+experiment=llama2_7b_w4a4kv4", "model.path=/a/folder").model
    assert (preset.weights, preset.path) == ("pretrained", "/a/folder")
    shapes = composed("+experiment=llama2_7b_w4a4kv4", "model.weights=random").model
    assert shapes.weights == "random"


# what is looked at -------------------------------------------------------------------------------


def test_numbers_are_looked_at_once_for_the_same_bytes(make_sources, make_checkpoint, tmp_path):
    first = make_sources(path=str(make_checkpoint("one")))
    moved = make_sources(path=shutil.copytree(tmp_path / "one", tmp_path / "two"))
    assert first.original.identity == moved.original.identity
    assert [(r.name, r.cached) for r in first.run.cache.reports] == [("check", False)]
    assert [(r.name, r.cached) for r in moved.run.cache.reports] == [("check", True)]


def test_a_model_that_is_not_finite_is_refused_every_time(make_sources, make_checkpoint):
    folder = make_checkpoint("one")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match=r"model.embed_tokens.weight .* NaN or infinity"):
            assert make_sources(path=str(folder)).calibration


def test_a_model_that_is_not_whole_is_told_with_its_shape(make_sources, make_checkpoint):
    """Its widths are asked for before any weight is read."""
    folder = make_checkpoint("one")
    assert make_sources(path=str(folder)).original.shape.config.hidden_size == 24
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sources = make_sources(path=str(folder))
    with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
        assert sources.original.shape
    assert not sources.run.cache.reports


def test_a_missing_tokenizer_is_told_before_any_stage(make_sources, make_checkpoint):
    folder = make_checkpoint("one")
    (folder / "tokenizer.json").unlink()
    sources = make_sources(path=str(folder))
    with pytest.raises(InputError, match="holds no tokenizer"):
        assert sources.calibration
    assert not sources.run.cache.reports


def test_tokens_depend_on_the_tokenizer_and_not_on_the_weights(make_sources, make_checkpoint):
    one, other = (make_sources(path=str(make_checkpoint(n, s))) for s, n in enumerate("ab"))
    assert one.original.identity != other.original.identity
    assert one.calibration.key == other.calibration.key
    assert one.evaluation.key == other.evaluation.key
    changed = make_checkpoint("c")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "A"})
    tokenizer.save_pretrained(changed)
    third = make_sources(path=str(changed))
    assert third.original.identity == one.original.identity
    assert third.calibration.key != one.calibration.key


def test_a_token_beyond_the_model_is_refused_where_a_text_holds_it(make_sources, make_checkpoint):
    """An added token lies beyond the embedding: usual for padding, and harmless until it is met."""
    folder = make_checkpoint("one")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert make_sources(path=str(folder)).calibration
    tokenizer.add_special_tokens({"pad_token": "sentence"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"holds token 257, .* vocab_size=256"):
        assert make_sources(path=str(folder)).calibration


def test_random_models_are_known_by_their_shape_and_seed(make_sources):
    sources = make_sources(architecture=SHAPE)
    other = Pipeline(replace(sources.config, seed=1))
    assert sources.original.identity["digest"] == {"random": SHAPE}
    assert sources.original.identity != other.original.identity
    assert sources.calibration.key == other.calibration.key
    assert not [r for r in sources.run.cache.reports if r.name == "check"]
