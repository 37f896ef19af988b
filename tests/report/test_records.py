"""Records are read the same whichever version wrote them."""

import json

from spinlab.report.records import read_record, record_files


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
