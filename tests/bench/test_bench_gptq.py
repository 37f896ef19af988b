"""The GPTQ bench leaves a record, and needs no more than a bare GPU machine has."""

import json
import subprocess
import sys

from spinlab.bench.__main__ import main

ABSENT = ["hydra", "omegaconf", "wandb", "datasets", "lm_eval", "geoopt", "matplotlib"]


def test_a_benchmark_leaves_a_record_of_seconds_and_bytes(tmp_path, capsys):
    out = tmp_path / "bench" / "toy.json"
    words = "gptq --model toy --samples 3 --length 16 --layers 1 --device cpu --out"
    main([*words.split(), str(out)])
    record = json.loads(out.read_text())
    assert record["experiment"] == "bench/gptq/toy"
    assert record["config"]["layers"] == 1
    metrics = record["metrics"]
    parts = sum(metrics[f"speed/gptq/seconds/{p}"] for p in ("hessians", "factors", "sweeps"))
    assert 0 < parts < metrics["speed/gptq/seconds"]
    assert metrics["bytes/gptq/peak"] > 0
    assert "speed/gptq/seconds" in capsys.readouterr().out


def test_benchmarks_need_nothing_that_a_bare_gpu_node_lacks():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\nimport spinlab.bench.__main__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
