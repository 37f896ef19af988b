"""Spreads over many seeds, and what learning changes seed by seed."""

import json
from pathlib import Path

import numpy as np

from spinlab.report.averaged import read_seeds
from spinlab.report.tables.seeds import seeds_table

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def save(folder: Path, start: str, seed: int, **metrics: float) -> None:
    whole = {"schema": 3, "experiment": start, "status": "complete", "config": {"seed": seed}}
    named = {f"ppl/wiki/{variant}": value for variant, value in metrics.items()}
    (folder / f"{start}_seed{seed}.json").write_text(json.dumps(whole | {"metrics": named}))


def test_a_row_is_a_start_and_a_network_with_the_change_of_each_seed(tmp_path):
    before, after = [20.0, 30.0, 50.0], [19.0, 33.0, 40.0]
    for seed, (init, fake) in enumerate(zip(before, after, strict=True)):
        save(tmp_path, "hadamard", seed, init=init, fake=fake)
    for seed, init in enumerate((60.0, 80.0)):
        save(tmp_path, "random", seed, init=init)
    (tmp_path / "titles.yaml").write_text("random: orthogonal\nhadamard: Hadamard\n")
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in seeds_table(tmp_path).split("\n")
    ]
    changes = 100 * (np.array(after) / before - 1)  # whose mean is not the change of the means
    assert rows[0] == ["rotation", "network", "seeds", "wiki ppl", "wiki range", "wiki change"]
    assert rows[2] == ["orthogonal", "init", "2", "70.00 ± 14.14", "60.00–80.00", ""]
    assert rows[3][:3] == ["Hadamard", "init", "3"]
    assert rows[4] == [
        *("Hadamard", "fake", "3", f"{np.mean(after):.2f} ± {np.std(after, ddof=1):.2f}"),
        *("19.00–40.00", f"{changes.mean():.1f} ± {changes.std(ddof=1):.1f} %"),
    ]


def test_the_committed_sweep_has_twenty_seeds_of_each():
    records = read_seeds(EXPERIMENTS / "seeds_smollm2")
    assert {start: [run["config"]["seed"] for run in runs] for start, runs in records.items()} == {
        "hadamard": list(range(20)),
        "random": list(range(20)),
    }
    measured = {name for run in records["hadamard"] for name in run["metrics"]}
    assert {"ppl/wiki/init", "ppl/wiki/fake", "ppl/c4/init", "ppl/c4/fake"} <= measured
