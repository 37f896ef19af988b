"""The table of one record."""

from pathlib import Path

import pytest

from spinlab.report.records import read_record
from spinlab.report.tables.record import result_table

ROOT = Path(__file__).parent.parent.parent


def test_rows_are_the_measured_variants_in_order():
    metrics = {
        "ppl/wiki/integer": 16.384,
        "ppl/wiki/fp": 9.321,
        "bytes/fp": 3 * 2**20,
        "zeroshot/piqa/acc/fp": 0.7,
        "zeroshot/piqa/acc_stderr/fp": 0.065,
        "zeroshot/piqa/n/fp": 50,
    }
    lines = result_table({"metrics": metrics, "config": {}}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["fp", "integer"]
    assert "wiki ppl" in lines[0]
    assert "9.32" in lines[2]
    assert "70.0 ± 6.5" in lines[2]
    assert "16.38" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_comparisons_have_columns_where_a_record_has_them():
    metrics = {
        "ppl/wiki/fp": 9.3,
        "ppl/wiki/fake": 18.0,
        "kl/wiki/fake": 0.61234,
        "kl_p99/wiki/fake": 3.0,
        "flips/wiki/fake": 0.3456,
        "zeroshot/piqa/acc/fp": 0.7,
        "zeroshot/piqa/acc_stderr/fp": 0.065,
        "zeroshot_mean/accuracy/fp": 0.7,
        "zeroshot_mean/stderr/fp": 0.065,
        "zeroshot_mean/difference/fake": -0.1,
        "zeroshot_mean/difference_stderr/fake": 0.02,
        "paired/piqa/acc/lost/fake": 4,
        "bytes/fp": 2**20,
    }
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in result_table({"metrics": metrics, "config": {}}).splitlines()
    )
    assert head[2:] == [
        "wiki ppl",
        "wiki KL",
        "wiki flips",
        "piqa",
        "mean",
        "difference",
        "MiB",
        "bits",
    ]
    assert rows[0][2:] == ["9.30", "—", "—", "70.0 ± 6.5", "70.0 ± 6.5", "—", "1", "—"]
    assert rows[1][2:] == ["18.00", "0.612", "34.6", "—", "—", "-10.0 ± 2.0", "—", "—"]


def test_the_committed_records_keep_their_promises():
    for path in sorted((ROOT / "experiments").glob("smollm2_135m_w4a4kv4.json")):
        metrics = read_record(path)["metrics"]
        for text in ("wiki", "c4"):
            ppl = {v: metrics[f"ppl/{text}/{v}"] for v in ("fp", "rtn", "init", "fake", "integer")}
            assert ppl["fp"] < ppl["fake"] < ppl["init"] < ppl["rtn"]
            assert ppl["integer"] == pytest.approx(ppl["fake"], rel=5e-3)
        wiki = {v: metrics[f"ppl/wiki/{v}"] for v in ("fp", "init", "fake")}
        assert wiki["fake"] <= min(2.3 * wiki["fp"], 0.5 * wiki["init"])
        assert metrics["invariance/learned"] < 1e-3
        assert metrics["invariance/integer"] < 1e-6
        assert max(metrics["orthogonality/r1"], metrics["orthogonality/r2"]) < 1e-6
