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
