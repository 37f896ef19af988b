"""Records are read the same whichever version wrote them."""

import json
import logging

from spinlab.report.records import read_below, read_record, record_files


def test_a_variant_has_one_name_whatever_the_record_calls_it(tmp_path):
    metrics = {"ppl/wiki/int4": 2.0, "ppl/wiki/fake": 2.0, "peer/int4_kv/b1": 1.0}
    for schema, name in ((2, "ppl/wiki/integer"), (3, "ppl/wiki/int4")):
        path = tmp_path / f"{schema}.json"
        whole = {"schema": schema, "experiment": "a", "status": "complete", "config": {}}
        path.write_text(json.dumps({**whole, "metrics": metrics}))
        found = read_record(path)["metrics"]
        assert set(found) == {name, "ppl/wiki/fake", "peer/int4_kv/b1"}
        assert found[name] == 2.0


def test_a_runs_folder_has_one_record_and_hides_none_outside_of_it(tmp_path):
    for name in ("a.json", "sweep/key/record.json", "sweep/key/wandb/files/b.json", "c/d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = {path.relative_to(tmp_path).as_posix() for path in record_files(tmp_path)}
    assert found == {"a.json", "sweep/key/record.json", "c/d.json"}


def test_files_of_another_kind_are_passed_over_and_torn_records_are_told(tmp_path, caplog):
    whole = {"schema": 3, "experiment": "a", "status": "complete", "config": {}, "metrics": {}}
    texts = {
        "kept.json": json.dumps(whole),
        "sweeps/digest/sweep.json": '{"words": [], "points": []}',
        "bench/cpu.json": '{"schema": 1, "metrics": {}}',
        "torn.json": '{"schema": ',
        "run/key/record.json": "{}",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        found = read_below(tmp_path, tmp_path / "run")
    assert [*found.kept] == [tmp_path / "kept.json"]
    assert {path.name for path in found.skipped} == {"torn.json", "record.json"}
    assert found.note == "Left out of 3 files: 1 broken; 1 no record of a run."
    told = " ".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "sweep.json" not in told and "cpu.json" not in told
