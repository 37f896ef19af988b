"""The benchmark of memory runs every stage on a checkpoint that it writes layer by layer."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from spinlab.bench import models
from spinlab.bench.memory import (
    Setting,
    bench_memory,
    estimates_of,
    experiment,
    job_of,
    shape_of,
    write_checkpoint,
)
from spinlab.errors import InputError
from spinlab.model.modules import layers_of
from spinlab.model.parts import Parts

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


def test_a_mixture_of_conf_has_a_checkpoint_whose_layers_come_one_by_one(tmp_path, monkeypatch):
    """Of the shape of Qwen3-235B two layers would, here some of few narrow experts."""
    whole = shape_of(Setting("qwen3_235b_a22b", 2, 1, 1, 48, "gptq", offload=True))
    assert (whole["model_type"], whole["num_experts"]) == ("qwen3_moe", 128)
    assert (whole["num_hidden_layers"], whole["hidden_size"]) == (2, 4096)
    narrow = {"vocab_size": 300, "hidden_size": 48, "moe_intermediate_size": 32, "num_experts": 4}
    narrow |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "head_dim": 12}
    monkeypatch.setitem(models.SHAPES, "narrow", {**whole, **narrow})
    monkeypatch.setitem(models.DTYPES, "narrow", torch.float32)
    setting = Setting("narrow", None, 1, 1, 48, "gptq", offload=True)
    size = write_checkpoint(shape_of(setting), torch.float32, tmp_path, CPU)
    layer = 48 * (2 * 4 + 2 * 4) * 12 + 4 * 48 + 4 * 3 * 48 * 32 + 2 * 48 + 2 * 12
    assert size == 4 * (2 * 300 * 48 + 2 * layer + 48)
    with safe_open(tmp_path / "model-00002.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118
    config = experiment(setting, CPU, tmp_path)
    (there,) = layers_of(Parts(config.model, None).part(1, CPU))
    assert sum(p.numel() for p in there.parameters()) == layer
    said = estimates_of(job_of(setting, config, CPU))
    assert said["weights/device"] > 4 * layer and said["eval-integer/host"] > 0


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    folder, checkpoint = tmp_path / "later", tmp_path / "checkpoint"
    checkpoint.mkdir()
    size = write_checkpoint(shape_of(SETTING), torch.float32, checkpoint, CPU)
    free = SimpleNamespace(free=size)  # the cache comes beside it
    monkeypatch.setattr("spinlab.memory.disk.shutil.disk_usage", lambda place: free)
    with pytest.raises(InputError, match=r"GiB to --folder=.*later, where"):
        bench_memory(SETTING, CPU, None, folder)
    assert not folder.exists()
