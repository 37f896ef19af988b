"""The benchmark of memory runs every stage on a checkpoint that it writes layer by layer."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from spinlab.bench.memory import Setting, bench_memory, shape_of, write_checkpoint
from spinlab.errors import InputError

SETTING = Setting("toy", 3, 2, 1, 48, "gptq", offload=True)
CPU = torch.device("cpu")


def test_the_checkpoint_is_one_that_transformers_load(tmp_path):
    size = write_checkpoint(shape_of(SETTING), torch.float32, tmp_path, CPU)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == 3
    assert size == 4 * sum(p.numel() for p in model.parameters())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + 3
    assert 0.015 < model.model.layers[2].mlp.up_proj.weight.std() < 0.025
    assert bool((model.model.norm.weight == 1).all())


def test_every_stage_is_in_the_record(tmp_path):
    record = bench_memory(SETTING, CPU, tmp_path / "memory.json", tmp_path / "there")
    metrics, stages = record["metrics"], ("rotate", "eval-fp", "weights", "handoff-integer")
    for stage in (*stages, "eval-integer", "eval-fake", "layers-fake", "outliers"):
        assert metrics[f"bytes/{stage}/host"] > 0
        assert metrics[f"speed/{stage}"] > 0
    for stage in ("rotate", "eval-fp", "weights", "eval-integer", "eval-fake"):
        assert metrics[f"estimate/{stage}/device"] > 0
        assert f"whole/{stage}/host" in metrics
    assert metrics["whole/weights/host"] < metrics["estimate/weights/host"]  # of 2 layers, not 3
    assert metrics["whole/weights/device"] == metrics["estimate/weights/device"]
    assert (tmp_path / "memory.json").exists()
    assert not list((tmp_path / "there").iterdir())


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    folder, checkpoint = tmp_path / "later", tmp_path / "checkpoint"
    checkpoint.mkdir()
    size = write_checkpoint(shape_of(SETTING), torch.float32, checkpoint, CPU)
    free = SimpleNamespace(free=size)  # the cache comes beside it
    monkeypatch.setattr("spinlab.memory.disk.shutil.disk_usage", lambda place: free)
    with pytest.raises(InputError, match=r"GiB to --folder=.*later, where"):
        bench_memory(SETTING, CPU, None, folder)
    assert not folder.exists()
