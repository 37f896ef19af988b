"""The table of methods: means, spreads, and complete records only."""

import json
from pathlib import Path

import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.averaged import read_seeds
from spinlab.report.tables.methods import methods_table, titles_of

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"


def record(wiki: float, steps: int = 0) -> dict:
    metrics = {"ppl/wiki/fake": wiki, "ppl/c4/fake": 5000.0, "ppl/wiki/fp": 9, "ppl/c4/fp": 30}
    config = {
        "weights": {"method": "gptq"},
        "learn": {"steps": steps, "batch": 8, "sequence_length": 512},
    }
    whole = {"schema": 2, "experiment": "methods", "status": "complete"}
    return {**whole, "metrics": metrics, "config": config}


def save(folder: Path, name: str, content: dict, seed: int = 0) -> None:
    content["config"]["seed"] = seed
    (folder / f"{name}_seed{seed}.json").write_text(json.dumps(content))


def test_a_row_is_the_mean_and_sample_deviation_over_seeds(tmp_path):
    values = [17.1, 18.4, 16.9]
    for seed, value in enumerate(values):
        save(tmp_path, "spinquant_had", record(value, steps=100), seed)
    save(tmp_path, "gptq", record(99.0))
    save(tmp_path, "untitled", record(98.0))
    (tmp_path / "titles.yaml").write_text("rtn: none\ngptq: no transform\nspinquant_had: had\n")
    lines = methods_table(tmp_path).splitlines()
    named = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:]]
    assert named == [
        *(["", "original"], ["gptq", "no transform"], ["spinquant_had", "had"]),
        ["untitled", ""],
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
        save(tmp_path, "spinquant_had", compared, seed)
    save(tmp_path, "gptq", record(99.0))
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
    # the original of a record that lacks answers is not averaged with the others in silence
    assert list(of_method[""].values()) == ["9.00", "30.00", *"————"]


def test_what_is_broken_or_made_otherwise_is_named_and_left_out_of_the_mean(tmp_path, caplog):
    save(tmp_path, "gptq", record(9.0), 0)
    save(tmp_path, "gptq", {**record(1.0), "status": "running"}, 1)
    save(tmp_path, "gptq", {**record(1.0), "schema": 1}, 2)
    save(tmp_path, "gptq", record(1.0, steps=5), 3)
    (tmp_path / "gptq_seed4.json").write_text("{")
    (tmp_path / "gptq_seed5.json").write_text((tmp_path / "gptq_seed0.json").read_text())
    assert "| 1     | 9.00 " in methods_table(tmp_path).splitlines()[3]
    for seed, reason in {
        1: "not complete: its status is 'running'",
        2: "older than others of its row: schema 1",
        3: "unlike others of its row: learn.steps is not that of gptq_seed0.json",
        4: "broken: JSONDecodeError",
        5: "a second one with its seed: gptq_seed0.json has 0 too",
    }.items():
        assert f"gptq_seed{seed}.json is left out: {reason}" in caplog.text
    (tmp_path / "gptq_seed0.json").unlink()
    (tmp_path / "gptq_seed5.json").unlink()
    (tmp_path / "gptq_seed2.json").unlink()
    (tmp_path / "gptq_seed3.json").unlink()
    with pytest.raises(InputError, match=r"holds no records .*gptq_seed1\.json: not complete"):
        methods_table(tmp_path)


def test_every_committed_row_has_a_title():
    folder = EXPERIMENTS / "quality" / "smollm2_135m"
    assert read_seeds(folder).keys() <= titles_of(folder).keys()


def test_every_committed_method_has_three_seeds_with_all_that_is_measured():
    records = read_seeds(EXPERIMENTS / "quality" / "smollm2_135m")
    for method, runs in records.items():
        seeds = {run["config"]["seed"] for run in runs}
        assert seeds == ({0} if method == "rtn" else {0, 1, 2}), method  # which draws nothing
        for metrics in (run["metrics"] for run in runs):
            tasks = {name.split("/")[1] for name in metrics if name.startswith("zeroshot/")}
            compared = {
                f"{kind}/{text}/fake" for kind in ("kl", "flips") for text in ("wiki", "c4")
            }
            assert len(tasks) == 6, method
            assert {*compared, "zeroshot_mean/difference_stderr/fake"} <= metrics.keys(), method
