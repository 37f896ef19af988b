import json
from dataclasses import replace

from spinlab.config import (
    Config,
    LearnConfig,
    PathsConfig,
    RuntimeConfig,
    TrackerConfig,
    WandbConfig,
)
from spinlab.track.record import Record, record_key


def test_the_key_follows_what_changes_numbers_and_nothing_else():
    config = Config()
    same = [
        replace(config, paths=PathsConfig(cache="elsewhere")),
        replace(config, tracker=TrackerConfig(WandbConfig(mode="disabled"))),
        replace(config, runtime=RuntimeConfig(device="cpu")),
    ]
    other = [replace(config, seed=1), replace(config, learn=LearnConfig(steps=3))]
    assert {record_key(c) for c in same} == {record_key(config)}
    assert len({record_key(c) for c in [config, *other]}) == 3


def test_an_unfinished_record_is_readable(tmp_path):
    record = Record(Config(paths=PathsConfig(runs=str(tmp_path))), ["seed=0"], {"python": "3"})
    record.metrics["ppl/wiki/fp"] = 9.0
    path = record.save()
    saved = json.loads(path.read_text())
    assert saved["status"] == "running"
    assert saved["metrics"] == {"ppl/wiki/fp": 9.0}
    assert path.parent == tmp_path / "custom" / record.key


def test_a_complete_record_is_only_replaced_by_a_complete_one(tmp_path):
    config = Config(paths=PathsConfig(runs=str(tmp_path)))
    record = Record(config, [], {}, metrics={"ppl/wiki/fp": 9.0}, status="complete")
    path = record.save()
    again = Record(config, [], {})
    assert again.save().name == "unfinished.json"
    assert json.loads(path.read_text())["metrics"] == {"ppl/wiki/fp": 9.0}
    again.status = "complete"
    assert again.save() == path
    assert not path.with_name("unfinished.json").exists()
