"""Exported checkpoints: known again by content, and never at the cost of what is not theirs."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spinlab.config import ModelConfig, RotationConfig
from spinlab.errors import InputError
from spinlab.export.identity import (
    digests_of,
    manifest_of,
    warn_of_dtype,
)
from spinlab.export.transformed import save_transformed
from spinlab.model import checkpoint
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.checkpoint import Checkpoint
from spinlab.model.files import MANIFEST
from spinlab.model.load import cast_model, load_model, source_digest
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.exchange import read_rotations
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.stored import read_about

MINE = {"README.md": "my notes", "notes/day.txt": "more", "adapter.safetensors": "not yours"}


@pytest.fixture
def export(make_family_model, tmp_path) -> Callable[..., RotationSet]:
    """Return what exports a tiny model, drawn and rotated by seed, to a path below a folder."""

    def save(path: str = "t", seed: int = 0, model_type: str = "llama") -> RotationSet:
        def make():
            return make_family_model(model_type, seed)

        generator = torch.Generator().manual_seed(seed)
        rotations = initial_rotations(RotationConfig(), map_of(make()), generator)
        rotations = replace(rotations, about={"family": model_type})
        model = QuantizedNetworks(make, None, None).stream_rotated(rotations)
        save_transformed(model, byte_tokenizer(), rotations, str(tmp_path / path))
        return rotations

    return save


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "granite", "mixtral"])
def test_an_export_is_an_ordinary_checkpoint_to_others(
    export, make_family_model, tmp_path, ids, model_type
):
    export(model_type=model_type)
    eager = {"experts_implementation": "eager"}  # others have no float64
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "t", dtype=torch.float64, **eager)
    expected = make_family_model(model_type)(ids).logits
    assert torch.allclose(found(ids).logits, expected, atol=1e-4)  # stock norms are float32
    # whoever saves it again passes on what it is
    found.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="lost its transform"):
        manifest_of(str(tmp_path / "again"))
    with pytest.raises(InputError, match="a/b is an exported model, and its transform"):
        Checkpoint("model.hub=a/b", tmp_path / "t", {"hub": "a/b"}).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "mixtral"])
def test_weights_come_back_with_every_bit_and_are_turned_on_as_before(
    make_family_model, tmp_path, model_type, dtype
):
    """What R4 and the cross-head rotation still have to turn has been through a file, or not."""

    def make():
        return cast_model(make_family_model(model_type), getattr(torch, dtype))

    config = RotationConfig(cross_head="hadamard")
    model_map, generator = map_of(make()), torch.Generator().manual_seed(0)
    rotations = initial_rotations(config, model_map, generator)
    networks = QuantizedNetworks(make, None, None)
    model = networks.stream_rotated(rotations)
    save_transformed(model, byte_tokenizer(), rotations, str(tmp_path / "t"))
    settings = ModelConfig(weights="pretrained", path=str(tmp_path / "t"), dtype=dtype)
    manifest = tmp_path / "t" / MANIFEST
    again = QuantizedNetworks(lambda: load_model(settings, None, 0), None, None)
    found = again.fused(read_rotations(manifest, model_map, manifest=True))
    expected = dict(networks.fused(rotations).named_parameters())
    assert dict(found.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in found.named_parameters())


def test_an_export_is_known_and_others_are_not_taken_for_one(export, tmp_path):
    export()
    assert manifest_of(str(tmp_path / "t")) == tmp_path / "t" / MANIFEST
    shutil.copytree(tmp_path / "t", tmp_path / "elsewhere")
    assert manifest_of(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere" / MANIFEST
    (tmp_path / "t" / "notes.txt").write_text("not of the export")
    assert manifest_of(str(tmp_path / "t")) is not None
    (tmp_path / "other").mkdir()
    for text in ("{}", "[]", "{", "\0"):
        (tmp_path / "other" / "config.json").write_text(text)
        assert manifest_of(str(tmp_path / "other")) is None
    for path in (None, "", "long" * 100, str(tmp_path / "missing")):
        assert manifest_of(path) is None


def test_an_exports_files_are_read_once_for_its_check_and_its_key(export, tmp_path, monkeypatch):
    export()
    read: list[str] = []
    digest = checkpoint.file_digest

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", counted)
    assert manifest_of(str(tmp_path / "t"))
    assert source_digest(ModelConfig(weights="pretrained", path=str(tmp_path / "t")))
    assert sorted(read) == sorted(set(read))
    assert {"model.safetensors", MANIFEST} <= set(read)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def reword(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CHANGES = {
    "weights": (lambda t: flip(t / "model.safetensors"), "model.safetensors changed since"),
    "weights gone": (lambda t: (t / "model.safetensors").unlink(), "is missing of what"),
    "another's weights": (
        lambda t: save_file({"x": torch.ones(1)}, t / "model.safetensors"),
        "model.safetensors changed since",
    ),
    "setting": (lambda t: reword(t / "config.json", rope_theta=7.0), "config.json changed since"),
    "tokenizer": (
        lambda t: reword(t / "tokenizer_config.json", bos_token="x"),
        "tokenizer_config.json changed since",
    ),
    "manifest": (lambda t: flip(t / MANIFEST), "transform.safetensors changed since"),
    "manifest gone": (lambda t: (t / MANIFEST).unlink(), "lost its transform.safetensors"),
    "manifest cut": (
        lambda t: (t / MANIFEST).write_bytes((t / MANIFEST).read_bytes()[:50]),
        "is no file of rotations",
    ),
    "entry gone": (lambda t: reword(t / "config.json", spinlab=None), "changed since"),
    "entry of another kind": (lambda t: reword(t / "config.json", spinlab=3), "changed since"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_that_is_no_longer_whole_is_refused(export, tmp_path, change):
    export()
    alter, message = CHANGES[change]
    alter(tmp_path / "t")
    with pytest.raises(InputError, match=message):
        manifest_of(str(tmp_path / "t"))


def test_another_dtype_is_another_number_and_is_said(export, tmp_path, caplog):
    manifest = tmp_path / "t" / MANIFEST
    export()
    caplog.clear()
    warn_of_dtype(manifest, "float32")  # it does not tell
    about = {**read_about(manifest), "model": {"dtype": "bfloat16"}}
    replace(RotationSet.load(manifest), about=about).save(manifest)
    warn_of_dtype(manifest, "bfloat16")
    assert not caplog.text
    warn_of_dtype(manifest, "float32")
    assert "was rotated and rounded in bfloat16: with model.dtype=float32" in caplog.text


def test_a_config_that_says_the_same_in_other_bytes_is_the_same(export, tmp_path):
    export()
    reword(tmp_path / "t" / "config.json")
    assert manifest_of(str(tmp_path / "t")) is not None


def earlier_version(folder: Path) -> None:
    """Turn an export into one from before exports listed their files."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["spinlab"]
    (folder / "config.json").write_text(json.dumps(settings))
    words = {"about": json.dumps({"fused": ["r1", "r2"]}), "blocks": json.dumps({})}
    save_file(load_file(folder / MANIFEST), folder / MANIFEST, words)


def test_an_export_of_an_earlier_version_is_taken_with_a_warning(export, tmp_path, caplog):
    export()
    earlier_version(tmp_path / "t")
    assert manifest_of(str(tmp_path / "t")) == tmp_path / "t" / MANIFEST
    assert "comes from an earlier version: its files cannot be checked" in caplog.text


@pytest.mark.parametrize("earlier", [False, True])
def test_a_new_export_replaces_its_own_files_and_no_others(export, tmp_path, earlier):
    export(seed=0)
    folder = tmp_path / "t"
    if earlier:
        earlier_version(folder)
        (folder / "model-00001-of-00002.safetensors").write_text("a part of before")
    else:  # what the earlier export lists and the new one has not
        about = read_about(folder / MANIFEST)
        about["files"]["old/part.json"] = "digest"
        replace(RotationSet.load(folder / MANIFEST), about=about).save(folder / MANIFEST)
        put(folder, {"old/part.json": "a part of before"})
    put(folder, MINE)
    export(seed=1)
    export("fresh", seed=1)
    (tmp_path / "any").write_text("as any new file")
    modes = {file.stat().st_mode for file in (tmp_path / "fresh").iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}
    found, fresh = contents(folder), contents(tmp_path / "fresh")
    assert found == {**fresh, **{name: text.encode() for name, text in MINE.items()}}
    assert manifest_of(str(folder)) is not None


def test_a_users_file_in_the_place_of_a_new_one_stops_the_export(export, tmp_path):
    export()
    folder = tmp_path / "t"
    about = read_about(folder / MANIFEST)
    del about["files"]["tokenizer_config.json"]
    replace(RotationSet.load(folder / MANIFEST), about=about).save(folder / MANIFEST)
    before = contents(folder)
    with pytest.raises(InputError, match=r"holds tokenizer_config\.json, which is not of"):
        export(seed=1)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["../precious", "/tmp/precious"])
def test_no_manifest_can_name_files_elsewhere(export, tmp_path, name):
    export()
    (tmp_path / "precious").write_text("precious")
    manifest = tmp_path / "t" / MANIFEST
    about = {"files": {name: "digest"}}
    replace(RotationSet.load(manifest), about=about).save(manifest)
    with pytest.raises(InputError, match=r"about\.files hold"):
        export(seed=1)
    assert (tmp_path / "precious").read_text() == "precious"


def test_an_export_through_a_link_lands_behind_it(export, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "t")  # not there yet
    export("link")
    export("link", seed=1)
    assert (tmp_path / "link").is_symlink()
    assert manifest_of(str(tmp_path / "deep" / "t")) is not None
    assert manifest_of(str(tmp_path / "link")) is not None
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_that_is_no_export_is_left_alone_and_an_empty_one_is_filled(export, tmp_path):
    (tmp_path / "empty").mkdir()
    export("empty")
    (tmp_path / "mine").mkdir()
    put(tmp_path / "mine", MINE)
    with pytest.raises(InputError, match="is there and no earlier export"):
        export("mine")
    assert set(contents(tmp_path / "mine")) == set(MINE)


def test_an_export_that_fails_leaves_what_was_there(export, tmp_path, monkeypatch):
    export()
    before = contents(tmp_path)
    monkeypatch.setattr(RotationSet, "save", lambda *arguments: 1 / 0)
    for path in ("t", "new"):
        with pytest.raises(ZeroDivisionError):
            export(path, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("after", range(6))
def test_a_kill_between_files_leaves_no_folder_that_is_taken_for_whole(
    export, tmp_path, monkeypatch, after
):
    """os.replace is where files get their names; the next export repairs what is left."""
    export()
    moved, rename = [], os.replace

    def killed(source, target):
        if Path(target).parent == tmp_path / "t" and Path(source).parent.suffix == ".partial":
            if len(moved) == after:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            export(seed=1)
        except KeyboardInterrupt:
            assert len(moved) == after
    whole = digests_of(tmp_path / "t") == read_about(tmp_path / "t" / MANIFEST)["files"]
    if moved and MANIFEST not in moved:
        with pytest.raises(InputError, match="exported: export it again"):
            manifest_of(str(tmp_path / "t"))
    else:
        assert whole
    export(seed=1)
    assert manifest_of(str(tmp_path / "t")) is not None


def test_two_exports_at_once_leave_one_that_is_whole(export, tmp_path):
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            export(seed=seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert manifest_of(str(tmp_path / "t")) is not None
