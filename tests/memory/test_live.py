"""What stages are said to hold, against the tensors that are there at every operation."""

import gc
from pathlib import Path

import pytest
import torch

from spinlab.bench import models
from spinlab.bench.memory import Setting, experiment, job_of, shape_of, write_checkpoint
from spinlab.memory.needs import needs
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of
from tests.live import Live

CPU = torch.device("cpu")
# wide beside the 256 tokens of gates, whose states are left out
SHAPE = {"vocab_size": 1000, "hidden_size": 384, "intermediate_size": 1536}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture
def setting(monkeypatch) -> Setting:
    monkeypatch.setitem(models.SHAPES, "wide", SHAPE)
    monkeypatch.setitem(models.DTYPES, "wide", torch.bfloat16)
    return Setting("wide", None, 2, 1, 256, "gptq", offload=True, variants=("fp", "integer"))


def test_layers_that_come_one_by_one_hold_what_is_estimated(setting, tmp_path: Path):
    write_checkpoint(shape_of(setting), torch.bfloat16, tmp_path, CPU)
    config = experiment(setting, CPU, tmp_path)
    pipeline, said = Pipeline(config), needs(job_of(setting, config, CPU))
    assert pipeline.calibration and pipeline.evaluation and pipeline.original.identity
    for name, ask in stages_of(pipeline):
        if name in ("rotate", "eval-fp", "weights"):
            device, host = (
                max(getattr(need, side) for need in said if need.name == name)
                for side in ("device", "host")
            )
            gc.collect()
            with Live() as live:
                ask()
            assert 0.85 * live.peak < device + host < 1.15 * live.peak, name
