"""What an experiment is about is known by content: files may move, and may not change unseen."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import spinlab.data.questions as questions
from spinlab.compose import composed
from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.random import random_model
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.pipeline import Pipeline
from spinlab.track.record import record_key

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def fill(folder: Path) -> None:
    """Write a checkpoint, a text for either purpose, and a file of rotations."""
    save_model(folder, seed=0)
    byte_tokenizer().save_pretrained(folder / "model")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"What {name} says. " * 20)
    RotationSet(r1=torch.eye(16, dtype=torch.float64)).save(folder / "R.safetensors")


def save_model(folder: Path, seed: int) -> None:
    random_model(ModelConfig(architecture=SHAPE), seed).save_pretrained(folder / "model")


def key(folder: Path, *overrides: str) -> str:
    """Return the key of the experiment on the files of a folder."""
    settings = [
        *("+experiment=toy", "learn=none", "eval.tasks=[piqa]"),
        *(f"model.path={folder}/model", "model.weights=pretrained"),
        *(f"data.calibration={folder}/a.txt", f"data.evaluation=[{folder}/b.txt]"),
        *(f"rotation.load={folder}/R.safetensors", f"paths.cache={folder}/cache"),
    ]
    config = composed(*settings, *overrides)
    identity = Pipeline(config).identity
    assert str(folder) not in json.dumps(identity)
    return record_key(config, identity)


def test_files_that_moved_are_the_same_experiment(tmp_path):
    fill(tmp_path / "here")
    before = key(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert key(tmp_path / "there") == before
    (tmp_path / "there" / "a.txt").rename(tmp_path / "there" / "renamed.txt")
    calibration = f"data.calibration={tmp_path}/there/renamed.txt"
    assert key(tmp_path / "there", calibration) == before
    shutil.copytree(tmp_path / "there" / "model", tmp_path / "there" / "other_name")
    assert key(tmp_path / "there", calibration, f"model.path={tmp_path}/there/other_name") == before


def test_files_that_changed_in_their_place_are_another_experiment(tmp_path, monkeypatch):
    fill(tmp_path)
    keys = [key(tmp_path)]

    def changed(name: str, old: str, new: str) -> None:
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new, 1))

    save_model(tmp_path, seed=1)
    keys.append(key(tmp_path))
    changed("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    keys.append(key(tmp_path))
    changed("model/tokenizer.json", '"A"', '"\\u0041"')  # the same letter in other bytes
    keys.append(key(tmp_path))
    for name in ("a.txt", "b.txt"):
        changed(name, "What", "Whatever")
        keys.append(key(tmp_path))
    RotationSet(r1=-torch.eye(16, dtype=torch.float64)).save(tmp_path / "R.safetensors")
    keys.append(key(tmp_path))
    monkeypatch.setattr(questions, "digest", lambda task: f"another {task}")
    keys.append(key(tmp_path))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("setting", ["data.calibration", "rotation.load"])
def test_what_lacks_is_told_before_any_stage(tmp_path, setting):
    fill(tmp_path)
    lost = tmp_path / f"lost.{'txt' if setting == 'data.calibration' else 'safetensors'}"
    with pytest.raises(InputError, match=r"lost\.\w+ does not exist"):
        key(tmp_path, f"{setting}={lost}")
    assert not list(tmp_path.glob("cache/*"))
