"""The benchmark of memory runs every stage on a checkpoint that it writes layer by layer."""

import torch
from transformers import AutoModelForCausalLM

from spinlab.bench.memory import Setting, bench_memory, shape_of, write_checkpoint

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
    record = bench_memory(SETTING, CPU, tmp_path / "memory.json")
    metrics, stages = record["metrics"], ("rotate", "eval-fp", "weights", "handoff-integer")
    for stage in (*stages, "eval-integer", "eval-fake", "layers-fake", "outliers"):
        assert metrics[f"bytes/{stage}/host"] > 0
        assert metrics[f"speed/{stage}"] > 0
    assert metrics["whole/GPTQ/host"] < metrics["estimate/GPTQ/host"]  # of 2 layers, not 3
    assert metrics["whole/GPTQ/device"] == metrics["estimate/GPTQ/device"]
    assert (tmp_path / "memory.json").exists()
