"""Shares of a log-perplexity gap, and the tables of one setting at a time."""

import json
import math
from pathlib import Path

import pytest

from spinlab.errors import InputError
from spinlab.report.averaged import read_seeds
from spinlab.report.pairs import gap_closed
from spinlab.report.tables.ablation import ablation_table
from spinlab.report.tables.gap import gap_summary, gap_table

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


def record(seed: int, wiki: float) -> dict:
    metrics = {"ppl/wiki/fake": wiki, "ppl/wiki/fp": 10.0}
    return {"config": {"seed": seed}, "metrics": metrics, "experiment": "methods/quarot"}


def test_the_share_of_a_gap_is_taken_in_logarithms_and_seed_by_seed():
    baseline = [record(1, 40.0), record(0, 20.0)]
    # half-way between 10 and 20, and between 10 and 40, is the geometric mean
    method = [record(0, math.sqrt(200)), record(1, 20.0)]
    assert gap_closed(method, baseline, "wiki") == pytest.approx([0.5, 0.5])


def test_a_method_or_seed_without_records_is_named():
    with pytest.raises(InputError, match=r"seed 2 has no record of methods/quarot, which has 0, 1"):
        gap_closed([record(2, 20.0)], [record(0, 20.0), record(1, 20.0)], "wiki")
    folder = EXPERIMENTS / "quality" / "smollm2_135m"
    with pytest.raises(InputError, match=r"no record is of 'quarott': did you mean quarot"):
        gap_table(folder, "quarott")
    with pytest.raises(InputError, match=r"no record is of 'none'"):
        gap_table(folder, "quarot", "none")
    with pytest.raises(InputError, match=r"no record is of 'none'"):
        gap_summary(folder, "x.json", "quarot", "none")


def test_a_row_says_what_runs_online():
    methods = ("spinquant_no_had", "learned_fused", "blocks_behind_r1", "learned_blocks")
    lines = gap_table(
        EXPERIMENTS / "quality" / "smollm2_135m", "quarot", *methods, "learned_inputs", "gptq"
    ).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    found = {row[0]: row[2] for row in rows if set(row[0]) != {"-"}}
    assert found == {
        **{"method": "online", "": "", "quarot": "R3, R4", "spinquant_no_had": "nothing"},
        **{"learned_fused": "R3, R4", "blocks_behind_r1": "R3, blocks"},
        "learned_blocks": "R3, R4, blocks",
        **{"learned_inputs": "R3, dual transforms", "gptq": "nothing"},
    }  # across 9 heads no Hadamard matrix turns QuaRot's


def test_a_deviation_needs_two_seeds(tmp_path):
    whole = {"schema": 3, "experiment": "a", "status": "complete"}
    (tmp_path / "a_seed0.json").write_text(json.dumps({**whole, **record(0, 20.0)}))
    with pytest.raises(InputError, match="a has one seed, which has no deviation"):
        gap_summary(tmp_path, "x.json", "a", "a")


def test_the_committed_summary_is_that_of_its_records():
    summary = json.loads((EXPERIMENTS / "best_smollm2.json").read_text())
    records = read_seeds(EXPERIMENTS / "quality" / "smollm2_135m")
    for text in ("wiki", "c4"):
        shares = gap_closed(records[summary["method"]], records["quarot"], text)
        assert len(shares) == 3
        found = summary["metrics"][f"quality/gap_closed/{text}"]
        assert found == pytest.approx(sum(shares) / 3)
        assert found > 0.4
    assert all((EXPERIMENTS / name).exists() for name in summary["records"])


def test_an_ablation_lists_the_best_value_first(tmp_path):
    rates = {"lr": {"r1": 0.3, "r2": None}}, {"lr": 0.7, "lr_r2": 3.0}  # the latter as at first
    for value, c4, found in zip(("slow_one", "fast"), (30.0, 20.0), rates, strict=True):
        learn = {**found, "steps": 5}
        metrics = {"ppl/wiki/fake": 5.0, "ppl/c4/fake": c4}
        stages = [{"name": "learn", "seconds": 7.4}]
        whole = {"schema": 1, "experiment": "", "status": "complete", "config": {"learn": learn}}
        path = tmp_path / f"optimizer_{value}_seed0.json"
        path.write_text(json.dumps({**whole, "metrics": metrics, "stages": stages}))
    lines = ablation_table(tmp_path, "optimizer").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["fast", "slow_one"]
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[2:]]
    assert cells == [["0.7", "3"], ["0.3", ""]]
    assert "| 20.00" in lines[2]
    assert "7 " in lines[2]
