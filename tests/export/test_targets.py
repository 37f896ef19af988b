"""Where an export may go: what can be known is said before any work, nothing is half written."""

import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spinlab.compose import composed
from spinlab.config import (
    Config,
    ExportConfig,
    KVConfig,
    LearnConfig,
    ModelConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    WeightsConfig,
)
from spinlab.errors import InputError
from spinlab.experiment import run
from spinlab.export.base import check_exports
from spinlab.export.rotations import save_rotations
from spinlab.export.targets import sole_writer
from spinlab.export.transformed import save_transformed
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import load_model
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.ranges import formats_of
from spinlab.rotation.rotations import RotationSet

GONE = 2**22 + 1  # no process has an id above the kernel's limit


def rotations(seed: int = 0, **changes) -> RotationSet:
    g = torch.Generator().manual_seed(seed)
    r2 = torch.stack([random_orthogonal(4, g) for _ in range(2)])
    return RotationSet(random_orthogonal(12, g), r2, **changes)


def random_rotation(width: int) -> OnlineRotation:
    g = torch.Generator().manual_seed(1)
    return OnlineRotation(torch.ones(1, 1).double(), random_orthogonal(width, g))


def check(rotations=None, transformed=None, **changes) -> None:
    paths = [None if path is None else str(path) for path in (rotations, transformed)]
    check_exports(Config(export=ExportConfig(*paths), **changes))


@pytest.fixture
def place(tmp_path) -> Path:
    """Return a folder with all that can be in the way."""
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.bin")
    rotations().save(tmp_path / "R.safetensors")
    ranged = rotations(weight_clips={"model.layers.0.mlp.up_proj": torch.ones(20, 1, 1)})
    ranged.save(tmp_path / "ranged.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "is there and no file of rotations: name another"),
        ("model.bin", "is there and no file of rotations: name another"),
        ("file/R.bin", "cannot be written: Not a directory"),
        ("file/deep/R.safetensors", "cannot be written: Not a directory"),
        (f"{'long' * 100}/R.bin", "cannot be written: File name too long"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_at_once(place, file, message):
    with pytest.raises(InputError, match=message):
        check(rotations=place / file)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "R.bin").mkdir()
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        check(rotations=tmp_path / "R.bin")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("folder", "is there and no earlier export: name another"),
        ("link", "is there and no earlier export: name another"),
        ("file", "cannot be written: Not a directory"),
        ("file/deep", "cannot be written: Not a directory"),
    ],
)
def test_a_checkpoint_that_could_not_be_written_is_refused_at_once(place, folder, message):
    with pytest.raises(InputError, match=message):
        check(transformed=place / folder)


def test_what_a_run_reads_is_not_overwritten(place):
    (place / "other").symlink_to(place / "R.safetensors")
    for name in ("R.safetensors", "link/../R.safetensors"):
        load = RotationConfig(load=str(place / "R.safetensors"))
        with pytest.raises(InputError, match=r"would overwrite what rotation\.load reads"):
            check(rotations=place / name, rotation=load)
    with pytest.raises(InputError, match=r"would overwrite what model\.path reads"):
        check(transformed=place / "link", model=ModelConfig(path=str(place / "folder")))
    with pytest.raises(InputError, match=r"lies in export\.transformed"):
        check(rotations=place / "t" / "R.bin", transformed=place / "t")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for target in ({"rotations": "R.bin"}, {"transformed": "t"}):
        (name, path) = next(iter(target.items()))
        with pytest.raises(InputError, match="cannot be written: Permission denied"):
            check(**{name: tmp_path / "locked" / path})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"learn": LearnConfig(quantize_weights=True, lr=RatesConfig(clip=0.1))},
            "cannot hold learned ranges of weights: set learn.lr.clip=0",
        ),
        (
            {"learn": LearnConfig(quantize_weights=True, lr=RatesConfig(input_clip=0.2))},
            "cannot hold learned ranges of inputs: set learn.lr.input_clip=0",
        ),
        (
            {"rotation": RotationConfig(r1="none")},
            "which rotation.r1=none leaves out: set rotation.r1=hadamard (or",
        ),
        (
            {"rotation": RotationConfig(r2="none")},
            "which rotation.r2=none leaves out: set rotation.r2=hadamard (or",
        ),
        (
            {"rotation": RotationConfig(r4="random")},
            "cannot hold an R4 that is no exact Hadamard: set rotation.r4=hadamard",
        ),
        (
            {"rotation": RotationConfig(r3="random")},
            "cannot hold an R3 that is no exact Hadamard: set rotation.r3=hadamard",
        ),
        (
            {"learn": LearnConfig(rotations=["r1", "r2", "r3"])},
            "cannot hold a learned R3: set learn.rotations without r3",
        ),
        (
            {"rotation": RotationConfig(r2="none", smooth=0.5, r1="none")},
            "cannot hold scales of inputs: set rotation.smooth=null",
        ),
        (
            {"rotation": RotationConfig("none", "none", r4="none", inputs="duquant")},
            "cannot hold online transforms of single inputs: set rotation.inputs=none",
        ),
    ],
    ids=str,
)
def test_what_an_r_bin_would_lose_is_known_from_the_settings(tmp_path, changes, words):
    with pytest.raises(InputError, match=re.escape(words)) as found:
        check(rotations=tmp_path / "R.bin", **changes)
    assert "an R.bin" in str(found.value) and ".safetensors" in str(found.value)
    check(rotations=tmp_path / "R.safetensors", **changes)
    assert not list(tmp_path.iterdir())


def test_exact_hadamards_are_no_loss_of_an_r_bin(tmp_path):
    for kind in ("hadamard", "exact_hadamard", "identity", "none"):
        check(rotations=tmp_path / "R.bin", rotation=RotationConfig(r3=kind, r4=kind))
    off = RotationConfig(r4="random", online=False)
    check(rotations=tmp_path / "R.bin", rotation=replace(off, cross_head="hadamard"))


MODEL = ModelConfig(
    architecture={
        **{"hidden_size": 12, "intermediate_size": 20, "head_dim": 4, "vocab_size": 256},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    }
)
UNLEARNED = {"learn": LearnConfig(steps=0), "model": MODEL}


def test_what_an_r_bin_would_lose_is_known_from_a_loaded_file(place):
    formats = {"trained": {"formats": formats_of(QuantConfig(), KVConfig())}}
    files = {
        "R": (rotations(), None),
        "exact": (rotations(r4=hadamard_rotation(20)), None),
        "r4": (rotations(r4=random_rotation(20)), "an R4 that is no exact Hadamard"),
        "ranged": (
            rotations(weight_clips={"model.layers.0.mlp.up_proj": torch.ones(20, 1, 1)}),
            None,
        ),  # for formats that it does not name: they are dropped
        "fits": (
            rotations(
                weight_clips={"model.layers.0.mlp.up_proj": torch.ones(20, 1, 1)}, about=formats
            ),
            "learned ranges of weights",
        ),
        "clips": (rotations(clips={"0.qkv": 0.5}), "learned ranges of inputs"),
        "folded": (rotations(inputs={"0.qkv": ScaledDual(torch.ones(12))}), "scales of inputs"),
    }
    for name, (made, lost) in files.items():
        file = place / f"{name}.safetensors"
        made.save(file)
        settings = {**UNLEARNED, "weights": WeightsConfig(method="rtn")}
        settings["rotation"] = RotationConfig(load=str(file))
        if lost is None:
            check(rotations=place / "new.bin", **settings)
            continue
        with pytest.raises(
            InputError, match=rf"cannot hold {lost}, which rotation\.load=.* brings"
        ):
            check(rotations=place / "new.bin", **settings)
        if name in ("fits", "clips"):  # which are learned anew
            check(rotations=place / "new.bin", **{**settings, "learn": LearnConfig(steps=1)})


def test_an_r_bin_of_a_file_without_r1_or_of_a_transformed_model_is_refused(place):
    replace(rotations(), r1=None).save(place / "half.safetensors")
    load = RotationConfig(load=str(place / "half.safetensors"))
    with pytest.raises(
        InputError, match=r"R1 and R2, and rotation\.load=.* does not bring R1: use"
    ):
        check(rotations=place / "new.bin", rotation=load, **UNLEARNED)
    model = replace(MODEL, path=str(place / "t"), weights="pretrained")
    (place / "t").mkdir()
    for made, words in (
        (RotationSet(r4=random_rotation(20)), "R4 that is no exact Hadamard, which model.path="),
        (RotationSet(r4=hadamard_rotation(20)), "does not bring R1 and R2: use .safetensors"),
    ):
        save_transformed(load_model(MODEL, None, 0), byte_tokenizer(), made, str(place / "t"))
        with pytest.raises(InputError, match=re.escape(words)):
            check(rotations=place / "new.bin", **{**UNLEARNED, "model": model})


def test_a_run_says_so_before_its_first_stage(tmp_path):
    paths = [f"paths.{name}={tmp_path / name}" for name in ("cache", "runs")]
    settings = ["learn.steps=2", "learn.lr.clip=0.1", f"export.rotations={tmp_path / 'R.bin'}"]
    with pytest.raises(InputError, match=r"an R\.bin.* set learn\.lr\.clip=0$"):
        run(composed("+experiment=toy", *settings, *paths), [])
    missing = f"rotation.load={tmp_path / 'R.safetensors'}"
    with pytest.raises(InputError, match=r"R\.safetensors does not exist"):
        run(composed("+experiment=toy", missing, *paths), [])
    assert not list(tmp_path.glob("*/*"))  # folders for cache and records, and nothing in them


def test_good_targets_pass_and_nothing_is_made(place):
    before = sorted(place.rglob("*"))
    check(rotations=place / "R.safetensors")  # an earlier file of rotations
    check(rotations=place / "new" / "deep" / "R.bin", transformed=place / "t")
    check(transformed=place / "folder" / "inner")  # empty
    check()
    assert sorted(place.rglob("*")) == before


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "any").write_text("as any new file")
    for name in ("R.safetensors", "R.bin"):
        save_rotations(rotations(), str(tmp_path / name))
        assert (tmp_path / name).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_file_is_replaced_at_once_and_behind_its_link(tmp_path):
    target, link = tmp_path / "R.safetensors", tmp_path / "deep" / "link.safetensors"
    link.parent.mkdir()
    link.symlink_to(target)
    save_rotations(rotations(0), str(target))
    first = target.read_bytes()
    save_rotations(rotations(0), str(tmp_path / "again.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == first
    save_rotations(rotations(1), str(link))
    assert link.is_symlink()
    assert torch.equal(RotationSet.load(target).r1, rotations(1).r1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"R.safetensors", "again.safetensors", "deep"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug")])
def test_what_fails_leaves_the_earlier_file(tmp_path, monkeypatch, error):
    target = tmp_path / "R.safetensors"
    save_rotations(rotations(), str(target))
    before = target.read_bytes()

    def fail(self, path):
        path.write_text("half")
        raise error

    monkeypatch.setattr(RotationSet, "save", fail)
    kind, words = (
        (InputError, "cannot write .*R.safetensors: No space left.*export.rotations")
        if isinstance(error, OSError)
        else (KeyError, "a bug")
    )
    with pytest.raises(kind, match=words):
        save_rotations(rotations(1), str(target))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_an_r_bin_that_would_lose_a_part_leaves_nothing(tmp_path):
    ranged = rotations(weight_clips={"model.layers.0.mlp.up_proj": torch.ones(20, 1, 1)})
    with pytest.raises(InputError, match="learned weight ranges"):
        save_rotations(ranged, str(tmp_path / "R.bin"))
    assert not list(tmp_path.iterdir())
    save_rotations(replace(ranged, weight_clips={}), str(tmp_path / "R.bin"))
    assert (tmp_path / "R.bin").is_file()


def test_writers_of_one_target_wait_for_each_other_and_say_so(tmp_path, caplog):
    caplog.set_level("INFO", "spinlab")
    target, inside, order = tmp_path / "t", threading.Event(), []

    def second() -> None:
        inside.wait(10)
        with sole_writer(target) as partial:
            order.append("second")
            (partial / "mine").write_text("second")

    thread = threading.Thread(target=second)
    thread.start()
    with sole_writer(target) as partial:
        (partial / "mine").write_text("first")
        inside.set()
        while "waiting for another process" not in caplog.text:
            thread.join(0.01)
        order.append("first")
        assert (partial / "mine").read_text() == "first"
    thread.join(10)
    assert order == ["first", "second"]
    assert f"waiting for another process that writes {target}" in caplog.text
    assert not list(tmp_path.iterdir())


def test_leftovers_of_the_dead_are_removed_and_other_files_stay(tmp_path):
    target = tmp_path / "t[1]"
    names = [f"t[1].partial-{GONE}", f"t[1].partial-{os.getpid()}", "t[1].partial-backup", "t1"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".t[1].partial").mkdir()
    (tmp_path / ".t[1].partial" / "half").write_text("half")
    with sole_writer(target) as partial:
        assert not list(partial.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == set(names[1:])
