"""The bench of rounding leaves a record, and needs no more than a bare GPU machine has."""

import json
import subprocess
import sys

import pytest

from spinlab.bench.__main__ import main

ABSENT = ["hydra", "omegaconf", "wandb", "datasets", "lm_eval", "geoopt", "matplotlib"]


@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_a_benchmark_leaves_a_record_of_seconds_and_bytes(method, tmp_path, capsys):
    out = tmp_path / "bench" / "toy.json"
    words = "--model toy --samples 3 --length 16 --layers 1 --device cpu --out"
    main(["rounding", "--method", method, *words.split(), str(out)])
    record = json.loads(out.read_text())
    assert record["experiment"] == f"bench/{method}/toy"
    assert record["config"]["layers"] == 1
    metrics, place = record["metrics"], f"speed/{method}/seconds"
    parts = [metrics[f"{place}/{p}"] for p in ("hessians", "factors", "sweeps", "forward")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < metrics[place]
    assert metrics[f"bytes/{method}/peak"] > 0
    assert place in capsys.readouterr().out


def test_benchmarks_need_nothing_that_a_bare_gpu_node_lacks():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\nimport spinlab.bench.__main__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
