"""The table of methods: means, spreads, and complete records only."""

import json
from pathlib import Path

import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.records import read_seeds
from spinlab.report.tables.methods import METHODS, methods_table

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


def record(wiki: float, steps: int = 0) -> dict:
    metrics = {"ppl/wiki/fake": wiki, "ppl/c4/fake": 5000.0, "ppl/wiki/fp": 9, "ppl/c4/fp": 30}
    config = {
        "weights": {"method": "gptq"},
        "learn": {"steps": steps, "batch": 8, "sequence_length": 512},
    }
    return {"status": "complete", "metrics": metrics, "config": config}


def test_a_row_is_the_mean_and_sample_deviation_over_seeds(tmp_path):
    values = [17.1, 18.4, 16.9]
    for seed, value in enumerate(values):
        path = tmp_path / f"spinquant_had_seed{seed}.json"
        path.write_text(json.dumps(record(value, steps=100)))
    (tmp_path / "gptq_seed0.json").write_text(json.dumps(record(99.0)))
    lines = methods_table(tmp_path).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "original",
        METHODS["gptq"],
        METHODS["spinquant_had"],
    ]
    assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in lines[4]
    assert "100 x 8 x 512" in lines[4]
    assert "| 5000 " in lines[3]
    assert "±" not in lines[3]


def test_comparisons_with_the_original_have_columns_once_a_record_has_them(tmp_path):
    for seed, kl in enumerate((0.4, 0.6)):
        more = {
            "kl/wiki/fake": kl,
            "flips/wiki/fake": 0.25,
            "zeroshot_mean/accuracy/fp": 0.5,
            "zeroshot_mean/stderr/fp": 0.01,
            "zeroshot_mean/accuracy/fake": 0.44 + seed / 50,
            "zeroshot_mean/stderr/fake": 0.012,
            "zeroshot_mean/difference/fake": -0.06 + seed / 50,
            "zeroshot_mean/difference_stderr/fake": 0.004,
        }
        compared = record(17.0)
        compared["metrics"] |= more
        (tmp_path / f"spinquant_had_seed{seed}.json").write_text(json.dumps(compared))
    (tmp_path / "gptq_seed0.json").write_text(json.dumps(record(99.0)))
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in methods_table(tmp_path).splitlines()
    )
    of_method = {row[0]: dict(zip(head[5:], row[5:], strict=True)) for row in rows}
    assert head[7:] == ["wiki KL", "wiki flips", "zero-shot", "difference"]
    assert of_method["spinquant_had"] == {
        "wiki ppl": "17.00",
        "c4 ppl": "5000",
        "wiki KL": "0.500 ± 0.141",
        "wiki flips": "25.0",
        "zero-shot": "45.0 ± 1.2",
        "difference": "-5.0 ± 0.4",
    }
    assert list(of_method["gptq"].values()) == ["99.00", "5000", *"————"]
    # the original of a record without tasks is not averaged with the others in silence
    assert list(of_method[""].values()) == ["9.00", "30.00", *"————"]


def test_records_that_are_not_complete_or_not_known_are_refused(tmp_path):
    (tmp_path / "gptq_seed0.json").write_text(json.dumps({**record(1.0), "status": "running"}))
    with pytest.raises(InputError, match="is not complete"):
        methods_table(tmp_path)
    (tmp_path / "gptq_seed0.json").rename(tmp_path / "other_seed0.json")
    (tmp_path / "other_seed0.json").write_text(json.dumps(record(1.0)))
    with pytest.raises(InputError, match="without a title"):
        methods_table(tmp_path)


def test_every_committed_method_has_three_seeds():
    records = read_seeds(EXPERIMENTS / "methods_smollm2")
    assert all(len(runs) == 3 for runs in records.values())
    assert {run["config"]["seed"] for runs in records.values() for run in runs} == {0, 1, 2}
