"""The record: its key, its contents, and no path of the machine."""

import errno
import json
import logging
import os
from dataclasses import replace

import pytest

from spinlab.config import (
    Config,
    DataConfig,
    LearnConfig,
    ModelConfig,
    PathsConfig,
    RotationConfig,
    RuntimeConfig,
    TrackerConfig,
    WandbConfig,
)
from spinlab.errors import InputError
from spinlab.track.record import Record, record_key, without_folders

IDENTITY = {"model": "a", "calibration": "b", "evaluation": {"wiki": "c"}}


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(paths=PathsConfig(runs=str(tmp_path)))


def local(path: str, **changes) -> ModelConfig:
    return ModelConfig(path=path, weights="pretrained", **changes)


def test_the_key_follows_what_changes_numbers_and_nothing_else():
    config = Config()
    same = [
        replace(config, paths=PathsConfig(cache="elsewhere")),
        replace(config, tracker=TrackerConfig(WandbConfig(mode="disabled"))),
        replace(config, runtime=RuntimeConfig(device="cpu")),
    ]
    other = [replace(config, seed=1), replace(config, learn=LearnConfig(steps=3))]
    assert {record_key(c, IDENTITY) for c in same} == {record_key(config, IDENTITY)}
    assert len({record_key(c, IDENTITY) for c in [config, *other]}) == 3


def test_contents_make_the_key_and_places_do_not():
    """The same files moved are the same experiment; others in the same place are another."""
    moved = [
        Config(
            model=local(f"/{place}/model", name=place, hub=f"{place}/model", revision=place),
            data=DataConfig(f"/{place}/a.txt", [f"/{place}/wiki.txt"]),
            rotation=RotationConfig(load=f"/{place}/R.bin"),
        )
        for place in ("here", "there")
    ]
    assert record_key(moved[0], IDENTITY) == record_key(moved[1], IDENTITY)
    others = [IDENTITY | {name: "z"} for name in ("model", "calibration", "rotations")]
    others += [IDENTITY | {"evaluation": {"wiki": "z"}}, IDENTITY | {"evaluation": {"other": "c"}}]
    keys = {record_key(moved[0], identity) for identity in (IDENTITY, *others)}
    assert len(keys) == 6


def test_weights_that_nobody_drew_are_in_no_key_and_no_record():
    shape, drawn = {"hidden_size": 96}, ModelConfig(outlier_channels=2)
    configs = [
        Config(model=local("m", architecture=a, outlier_channels=n))
        for a, n in ((shape, 2), ({}, 0))
    ]
    assert len({record_key(c, IDENTITY) for c in configs}) == 1
    assert "architecture" not in Record(configs[0], [], {}, IDENTITY).as_json()["config"]["model"]
    assert record_key(Config(model=drawn), IDENTITY) != record_key(Config(), IDENTITY)


@pytest.mark.parametrize(
    ("model", "overrides", "name"),
    [
        (ModelConfig(name="toy"), [], "toy"),
        (local("/models/Mine-7B/", name="toy"), ["model.path=/models/Mine-7B/"], "Mine-7B"),
        (local("~/Mine-7B", name="toy"), [], "Mine-7B"),
        (local("/models/x", name="mine"), ["+experiment=toy", "model.name=mine"], "mine"),
        (ModelConfig(name="llama2_7b", hub="meta/llama", weights="pretrained"), [], "llama2_7b"),
    ],
)
def test_a_record_names_the_model_that_ran(model, overrides, name):
    record = Record(Config(model=model), overrides, {}, IDENTITY)
    assert record.as_json()["config"]["model"]["name"] == name


def test_no_path_of_the_machine_is_in_a_record(tmp_path):
    home = f"{tmp_path}/my home"
    config = Config(
        model=local(f"{home}/model", hub=f"{home}/hub"),
        data=DataConfig(f"{home}/a.txt", [f"{home}/b.txt", "~/c.txt", "wiki"]),
        rotation=RotationConfig(load=f"{home}/R.bin"),
        paths=PathsConfig(f"{home}/cache", f"{home}/runs"),
    )
    overrides = [
        *(f"{sign}paths.cache={home}/cache" for sign in ("", "+", "++")),
        *(f"rotation.load={home}/R.bin", f"export.transformed={home}/t"),
        *(f"++model.path={home}/model", f"+data.evaluation=[{tmp_path}/b.txt,~/c.txt]", "seed=1"),
    ]
    record = Record(config, overrides, {"mirror": f"stopped at {tmp_path}/x: full"}, IDENTITY)
    record.end(InputError(f"model.path={tmp_path}/model holds no config.json, see '{tmp_path}/x'"))
    saved = record.as_json()
    text = json.dumps(saved)
    assert str(tmp_path) not in text
    assert os.path.dirname(tmp_path) not in text
    assert saved["overrides"] == ["+data.evaluation=[b.txt,c.txt]", "seed=1"]
    assert saved["config"]["data"] == {
        "calibration": "a.txt",
        "evaluation": ["b.txt", "c.txt", "wiki"],
        "held_out": "evaluation",
    }
    assert saved["config"]["model"]["path"] == "model"
    assert saved["environment"]["mirror"] == "stopped at x: full"
    assert saved["status"] == "failed: InputError: model.path=model holds no config.json, see 'x'"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("cannot write /home/me/my runs/toy/x: it is full", "cannot write x: it is full"),
        ("see '/home/my home/a b/log of it' and copy", "see 'log of it' and copy"),
        ("open file:///home/me/x.log, or file:/home/me/y", "open x.log, or y"),
        ("nothing like /data/*/part-?.txt here", "nothing like part-?.txt here"),
        ("/data/*/x", "x"),
        ("/home/me/x is not /home/me/y", "x is not y"),
        ("/home/me/x is full: free some, as in a/b", "x is full: free some, as in a/b"),
        ("PATH=/usr/bin:/home/me/bin", "PATH=bin:bin"),
        ("copy /a/b to ~/c/d or ../e/f", "copy b to d or f"),
        ("//server/share/x is gone", "x is gone"),
        ("from https://hf.co/a/b to /home/me/b", "from https://hf.co/a/b to b"),
        ("/home/me/Mr. X/a.txt", "a.txt"),
        ("/home/a,b (c)/x y.txt", "x y.txt"),
        ("line one\n/home/me/x\nline two", "line one\nx\nline two"),
    ],
)
def test_a_path_in_a_sentence_is_cut_to_its_end(text, short):
    assert without_folders([text]) == [short]
    assert without_folders({text: text}) == {short: short}


@pytest.mark.parametrize(
    "text",
    ["ppl/wiki/fp", "meta-llama/Llama-2-7b", "(out, in/g)", "1 / 2", "https://hf.co/a/b", "a: 3/4"],
)
def test_what_is_no_path_is_left_as_it_is(text):
    assert without_folders({"a": [text, 1, None]}) == {"a": [text, 1, None]}


def test_an_unfinished_record_is_readable(config, tmp_path):
    record = Record(config, ["seed=0"], {"python": "3"}, IDENTITY)
    record.metrics["ppl/wiki/fp"] = 9.0
    path = record.save()
    saved = json.loads(path.read_text())
    assert saved["status"] == "running"
    assert saved["metrics"] == {"ppl/wiki/fp": 9.0}
    assert saved["identity"] == IDENTITY
    assert path.parent == tmp_path / "custom" / record.key


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "failed: ValueError: no"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
    ],
)
def test_a_record_tells_a_failure_from_an_interruption(config, error, status):
    record = Record(config, [], {}, IDENTITY)
    record.end(error)
    assert json.loads(record.save().read_text())["status"] == status


def test_a_complete_record_is_only_replaced_by_a_complete_one(config):
    record = Record(config, [], {}, IDENTITY, metrics={"ppl/wiki/fp": 9.0}, status="complete")
    path = record.save()
    again = Record(config, [], {}, IDENTITY)
    assert again.save().name == "unfinished.json"
    assert json.loads(path.read_text())["metrics"] == {"ppl/wiki/fp": 9.0}
    again.end(KeyboardInterrupt())
    assert again.save().name == "unfinished.json"
    again.status = "complete"
    assert again.save() == path
    assert not path.with_name("unfinished.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'"complete"', b'{"status": 3}', b"{}", b"\xff\xfe{}"]
)
def test_a_damaged_record_is_set_aside_with_a_warning(config, caplog, content):
    record = Record(config, [], {}, IDENTITY)
    path = record.save()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert record.save() == path
    assert json.loads(path.read_text())["status"] == "running"
    assert path.with_name("record.json.damaged").read_bytes() == content
    assert "is set aside as record.json.damaged" in caplog.text


def test_a_damaged_record_does_not_stand_for_a_complete_one(config):
    record = Record(config, [], {}, IDENTITY, status="complete")
    path = record.save()
    path.write_text(path.read_text()[:-20])
    assert record.save() == path
    assert json.loads(path.read_text())["status"] == "complete"


def test_a_record_that_cannot_be_written_ends_in_a_sentence(config, tmp_path, monkeypatch):
    (tmp_path / "custom").write_text("a file where the experiment's folder should be")
    with pytest.raises(InputError, match=r"cannot write .*custom.*: set paths\.runs to a folder"):
        Record(config, [], {}, IDENTITY).save()
    (tmp_path / "custom").unlink()

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"No space left on device: free some space"):
        Record(config, [], {}, IDENTITY).save()
    assert not list(tmp_path.glob("*/*/*.json*"))
