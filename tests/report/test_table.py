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


def test_what_was_measured_of_the_cache_has_columns_and_its_bits_what_they_stand_for():
    metrics = {
        **{"ppl/wiki/fp": 9.3, "ppl/wiki/fake": 18.0, "bits/weights/fake": 16.0},
        **{"diverges/wiki/fake": 12.34, "attention_score/wiki/fake": 0.12345},
        **{
            "kl/wiki/fake": -1e-9,
            "attention_kl/wiki/fake": 0.01234,
            "attention_output/wiki/fake": 0.05,
        },
        **{"needle/1024/fp": 1.0, "needle_stderr/1024/fp": 0.0},
        **{"needle/256/fake": 0.75, "needle_stderr/256/fake": 0.09682, "needle_nats/256/fake": 1.0},
        **{"bits/kv/fake": 2.34, "coded/kv/fake": 0.25},
    }
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[3:-1]]
        for line in result_table({"metrics": metrics, "config": {}}).splitlines()
    )
    told = dict(zip(head, zip(*rows, strict=True), strict=True))
    assert told == {
        "wiki ppl": ("9.30", "18.00"),
        "wiki KL": ("—", "0.000"),
        "wiki diverges": ("—", "12.3"),
        "wiki score error": ("—", "0.123"),
        "wiki attention KL": ("—", "0.0123"),
        "wiki output error": ("—", "0.0500"),
        "needle 256": ("—", "75.0 ± 9.7"),
        "needle 1024": ("100.0", "—"),
        "MiB": ("—", "—"),
        "bits": ("—", "16.00"),
        "KV bits": ("—", "2.34"),
        "KV coded": ("—", "25.0"),
    }
    for none_left in ({"coded/kv/fake": 0.9999}, {"coded/kv/fake": 0.0, "bits/kv/fake": 16.0}):
        whole = result_table({"metrics": metrics | none_left, "config": {}})
        assert "coded" not in whole
    whole = result_table({"metrics": metrics | {"coded/kv/fake": 1.0}, "config": {}})
    assert "KV bits" in whole and "KV coded" not in whole


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
