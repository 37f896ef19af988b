"""Records are read the same whichever version wrote them."""

import json

from spinlab.report.records import read_record


def test_a_variant_has_one_name_whatever_the_record_calls_it(tmp_path):
    metrics = {"ppl/wiki/int4": 2.0, "ppl/wiki/fake": 2.0, "peer/int4_kv/b1": 1.0}
    for schema, name in ((2, "ppl/wiki/integer"), (3, "ppl/wiki/int4")):
        path = tmp_path / f"{schema}.json"
        whole = {"schema": schema, "experiment": "a", "status": "complete", "config": {}}
        path.write_text(json.dumps({**whole, "metrics": metrics}))
        found = read_record(path)["metrics"]
        assert set(found) == {name, "ppl/wiki/fake", "peer/int4_kv/b1"}
        assert found[name] == 2.0
