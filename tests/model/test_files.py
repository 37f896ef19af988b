"""Broken folders: one sentence with the file and the cure, before anything is loaded."""

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.files import shards_of, weights_of
from spinlab.model.load import check_model, tokenizer_digest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"


def local(folder) -> ModelConfig:
    return ModelConfig(weights="pretrained", path=str(folder))


def refusal(folder) -> str:
    """Return the one sentence that a folder is refused with."""
    with pytest.raises(InputError) as mistake:
        tokenizer_digest(local(folder))
        check_model(local(folder))
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_instead_of_a_file_is_named_with_its_cure(folder, name):
    (folder / name).write_bytes(POINTER)
    assert f"{name} is a Git LFS pointer" in refusal(folder)
    assert "git lfs pull" in refusal(folder)


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_a_torn_weight_file_is_named(folder, cut):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    assert "model.safetensors is torn" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'\xef\xbb\xbf{"model_type": "llama"}', "byte order mark"),
        (b'{"model_type": ', "is no JSON"),
        (b"\xff\xfa", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'["llama"]', "holds a list"),
        (b"", "is no JSON"),
    ],
    ids=["bom", "cut", "bytes", "deep", "list", "empty"],
)
def test_settings_that_are_no_json_object_are_named(folder, name, content, words):
    (folder / name).write_bytes(content)
    assert name in refusal(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("consolidated.safetensors", "another layout"),
        ("consolidated.00.pth", "another layout"),
        ("pytorch_model.bin", "pickled weights are not read"),
        ("model-00001-of-00002.safetensors", "copy model.safetensors.index.json"),
        ("other.safetensors", "give a folder with the weights"),
    ],
)
def test_weights_under_another_name_are_refused_with_the_reason(folder, name, words):
    (folder / "model.safetensors").rename(folder / name)
    assert "holds no model.safetensors" in refusal(folder)
    assert words in refusal(folder)


def test_weights_that_are_a_dead_link_are_told_so(folder):
    (folder / "model.safetensors").unlink()
    os.symlink(folder / "gone", folder / "model.safetensors")
    assert "a link to nothing" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refusal(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_not_passed_over(folder, name):
    (folder / name).write_text("{}")
    assert "merge it into its base model" in refusal(folder)


def test_what_is_no_folder_is_told_what_to_give(folder, tmp_path):
    assert "is a file: give the folder" in refusal(folder / "config.json")
    assert "did you mean its folder checkpoint?" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal(tmp_path / "empty")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "holds no config.json" in refusal(folder) or "cannot be read" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_one_sentence(folder):
    folder.chmod(0)
    try:
        assert "cannot be read: Permission denied" in refusal(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "model.bin", 3])
def test_an_index_may_name_only_safetensors_in_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"names {name}" in refusal(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_shards_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="lists no shards"):
        shards_of(tmp_path / "index.json")


def test_a_missing_shard_is_named(tmp_path, save_checkpoint):
    save_checkpoint(tmp_path, size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert weights_of("it", tmp_path) == shards
    assert len(shards) > 1
    shards[1].unlink()
    assert f"lacks {shards[1].name}, one of {len(shards)} files" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, save_checkpoint):
    save_checkpoint(tmp_path, size="40KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"holds {name} again" in refusal(tmp_path)


def test_the_single_file_is_read_where_an_index_lies_beside_it(folder):
    """As transformers chooses; so the index is not looked at."""
    (folder / "model.safetensors.index.json").write_text("{")
    assert weights_of("it", folder) == [folder / "model.safetensors"]


def test_parts_of_a_distributed_checkpoint_are_refused(folder):
    """Newer transformers would read them in place of the weights."""
    (folder / "shard-00000-model-00001-of-00002.safetensors").write_bytes(b"")
    assert "distributed checkpoint" in refusal(folder)


def test_a_missing_family_is_named_with_its_file(folder, change_json):
    change_json(folder / "config.json", lambda settings: settings.pop("model_type"))
    assert "config.json: model_type=None names no model family" in refusal(folder)
