import json
import logging

import pytest

from spinlab.files import content_key, write_json
from spinlab.stage import PROGRESS, Stages


def work_once(calls: list):
    def work(folder):
        calls.append(folder)
        (folder / "result.txt").write_text("42")

    return work


def test_the_same_inputs_are_computed_once(tmp_path):
    calls: list = []
    for _ in range(2):
        folder, key = Stages(tmp_path).run("s", {"a": 1}, work_once(calls))
        assert (folder / "result.txt").read_text() == "42"
        assert folder.name == f"s-{key}"
    assert len(calls) == 1


def test_other_inputs_names_and_code_have_other_keys(tmp_path):
    stages = Stages(tmp_path)
    keys = {
        stages.run("s", {"a": 1}, work_once([]))[1],
        stages.run("s", {"a": 2}, work_once([]))[1],
        stages.run("t", {"a": 1}, work_once([]))[1],
        stages.run("s", {"a": 1}, work_once([]), code=("stage",))[1],
    }
    assert len(keys) == 4


def test_a_key_does_not_depend_on_the_order_of_settings():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})


def test_a_failed_stage_keeps_its_progress_and_is_not_finished(tmp_path):
    def fail(folder):
        (folder / PROGRESS / "half.txt").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).run("s", 1, fail)

    def finish(folder):
        assert (folder / PROGRESS / "half.txt").read_text() == "half"
        (folder / "result.txt").write_text("whole")

    folder, _ = Stages(tmp_path).run("s", 1, finish)
    assert (folder / "result.txt").read_text() == "whole"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "result.txt").write_text("43"),
        lambda folder: (folder / "result.txt").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("null"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    ],
    ids=["altered", "missing", "no manifest", "torn manifest", "null", "empty manifest"],
)
def test_a_damaged_entry_is_computed_again_with_a_warning(tmp_path, caplog, damage):
    calls: list = []
    folder, _ = Stages(tmp_path).run("s", 1, work_once(calls))
    damage(folder)
    with caplog.at_level(logging.WARNING):
        Stages(tmp_path).run("s", 1, work_once(calls))
    assert len(calls) == 2
    assert (folder / "result.txt").read_text() == "42"
    assert "is damaged" in caplog.text


def test_reports_tell_what_was_cached(tmp_path):
    Stages(tmp_path).run("s", 1, work_once([]))
    stages = Stages(tmp_path)
    stages.run("s", 1, work_once([]))
    stages.run("t", 1, work_once([]))
    assert [(r["name"], r["cached"]) for r in stages.as_json()] == [("s", True), ("t", False)]
    assert all(r["peak_memory_bytes"] > 0 for r in stages.as_json())


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
