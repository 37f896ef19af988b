"""Runs of tiny random models of any family, from settings to the record and what they export."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinlab import experiment
from spinlab.compose import composed

BARE = ["+experiment=toy", "model=random", "tracker=none"]
_SMALL = [*BARE, "eval.tasks=[]", "eval.max_windows=1"]


def run(folder: Path, *overrides: str) -> dict:
    """Return the record of a run whose cache and results lie in a folder."""
    words = [
        *_SMALL,
        *overrides,
        f"paths.cache={folder / 'cache'}",
        f"paths.runs={folder / 'runs'}",
    ]
    record = experiment.run(composed(*words), words)
    return json.loads(record.path.read_text())


def exported_and_taken_again(folder: Path, family: str, *overrides: str) -> PreTrainedModel:
    """Export a checkpoint, run it as a model of its own, and return it as transformers reads it."""
    place, off = folder / "c", ["rotation=no_had", "learn=none", "eval.variants=[fp,fake]"]
    record = run(folder, *off, *overrides, f"export.checkpoint={place}")
    shape = ("+model.architecture", "~model.architecture", "model.architecture")
    rest = [word for word in overrides if not word.startswith(shape)]
    found = run(folder, "model.weights=pretrained", f"model.path={place}", *off, *rest)
    assert found["model"]["family"] == family
    ppls = [name for name in record["metrics"] if name.startswith("ppl/") and name.endswith("/fp")]
    for name in ppls:  # rounded to bfloat16 in between
        assert found["metrics"][name] == pytest.approx(record["metrics"][name], rel=1e-2)
    assert ppls
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
