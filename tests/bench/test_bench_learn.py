"""The learning bench leaves a record, and holds an experiment against its definition."""

import json

import pytest

from spinlab.bench.__main__ import main


def test_learning_leaves_a_record_of_seconds_bytes_and_its_curve(tmp_path, capsys):
    out = tmp_path / "learn.json"
    words = "learn --model toy --length 16 --layers 1 --device cpu --out"
    settings = ["steps=3", "batch=2", "dtype=bfloat16", "lr.r2=0.5", "rotations=[r2]"]
    main([*words.split(), str(out), *settings, "optimizer.max_grad_norm=null"])
    record = json.loads(out.read_text())
    learn = record["config"]["learn"]
    assert (learn["lr"]["r2"], learn["rotations"]) == (0.5, ["r2"])
    assert learn["optimizer"]["max_grad_norm"] is None
    assert record["experiment"] == "bench/learn/toy"
    assert record["config"]["learn"]["steps"] == len(record["curve"]) == 3
    assert record["config"]["dtype"] == "bfloat16"
    metrics = record["metrics"]
    assert 0 < metrics["speed/learn/seconds/step"] < metrics["speed/learn/seconds"]
    assert metrics["bytes/learn/peak"] > 0
    assert "speed/learn/seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("learned_fused", ("hadamard", "scales", ["r1", "r2", "inputs"])),
        ("learned_blocks", ("none", "blocks", ["r2", "inputs"])),
        ("learned_inputs", ("none", "duquant", ["inputs"])),
    ],
)
def test_a_method_brings_its_rotations_and_its_learning(tmp_path, method, parts):
    out = tmp_path / "learn.json"
    words = f"learn --method {method} --model toy --length 16 --layers 1 --device cpu --out"
    main([*words.split(), str(out), "steps=2", "batch=2", "micro_batch=2", "optimizer.warmup=0"])
    record = json.loads(out.read_text())
    rotation, learn = (record["config"][part] for part in ("rotation", "learn"))
    assert (rotation["r1"], rotation["inputs"], learn["rotations"]) == parts
    assert learn["lr"]["scale"] == 0.03
    assert record["metrics"]["speed/learn/seconds"] > 0
    assert len(set(record["curve"])) == 2


def test_unknown_settings_of_the_learning_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["learn", "--model", "toy", "--device", "cpu", "speed=1"])
    assert "unknown setting 'learn.speed'" in capsys.readouterr().err


@pytest.mark.parametrize("rounded", ["false", "true"])
def test_an_experiments_learning_is_held_against_its_definition(tmp_path, rounded):
    out = tmp_path / "forms.json"
    small = ["learn.steps=3", "learn.batch=2", "learn.sequence_length=32", "model.dtype=float64"]
    paths = [f"paths.cache={tmp_path / 'cache'}", f"learn.quantize_weights={rounded}"]
    main(["forms", "+experiment=toy", *small, *paths, "--out", str(out)])
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["learn/curve_difference"] < 1e-9
    assert metrics["speed/learn/seconds/plain"] > 0
