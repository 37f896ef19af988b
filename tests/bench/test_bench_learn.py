"""The learning bench leaves a record, and holds an experiment against its definition."""

import json

import pytest

from spinlab.bench.__main__ import main
from spinlab.bench.learn import with_settings
from spinlab.config import LearnConfig
from spinlab.errors import InputError


def test_learning_leaves_a_record_of_seconds_bytes_and_its_curve(tmp_path, capsys):
    out = tmp_path / "learn.json"
    words = "learn --model toy --length 16 --layers 1 --device cpu --out"
    main([*words.split(), str(out), "steps=3", "batch=2", "dtype=bfloat16"])
    record = json.loads(out.read_text())
    assert record["experiment"] == "bench/learn/toy"
    assert record["config"]["learn"]["steps"] == len(record["curve"]) == 3
    assert record["config"]["dtype"] == "bfloat16"
    metrics = record["metrics"]
    assert 0 < metrics["speed/learn/seconds/step"] < metrics["speed/learn/seconds"]
    assert metrics["bytes/learn/peak"] > 0
    assert "speed/learn/seconds" in capsys.readouterr().out


def test_settings_are_read_as_yaml_and_unknown_ones_refused():
    found = with_settings(LearnConfig(), ["lr_r2=0.5", "rotations=[r1]", "max_grad_norm=null"])
    assert (found.lr_r2, found.rotations, found.max_grad_norm) == (0.5, ["r1"], None)
    with pytest.raises(InputError, match=r"learn\.speed"):
        with_settings(LearnConfig(), ["speed=1"])


@pytest.mark.parametrize("rounded", ["false", "true"])
def test_an_experiments_learning_is_held_against_its_definition(tmp_path, rounded):
    out = tmp_path / "forms.json"
    small = ["learn.steps=3", "learn.batch=2", "learn.sequence_length=32", "model.dtype=float64"]
    paths = [f"paths.cache={tmp_path / 'cache'}", f"learn.quantize_weights={rounded}"]
    main(["forms", "+experiment=toy", *small, *paths, "--out", str(out)])
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["learn/curve_difference"] < 1e-9
    assert metrics["speed/learn/seconds/plain"] > 0
