"""What is estimated of stages on a GPU, against what committed records measured there."""

import json
from pathlib import Path

import pytest
import torch

from spinlab.bench.memory import Setting, estimates_of, experiment, job_of

RECORDS = sorted((Path(__file__).parents[2] / "experiments/bench").glob("memory_*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_estimates_are_measured_peaks(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in record["config"].items() if name != "device"}
    setting = Setting(**{**settings, "variants": tuple(settings["variants"])})
    config = experiment(setting, torch.device("cpu"), Path("unread"))
    said = estimates_of(job_of(setting, config, torch.device("cuda", 0)))
    metrics = record["metrics"].items()
    measured = {name.split("/")[1]: held for name, held in metrics if name.endswith("/device")
                and name.startswith("bytes/")}  # fmt: skip
    assert {"rotate", "eval-fp"} <= measured.keys()  # a run's time may end before its stages do
    for stage, held in measured.items():
        needed = said[f"{stage.replace('layers', 'eval')}/device"]
        assert needed == pytest.approx(held, rel=0.01), stage


def test_some_record_has_all_stages():
    stages = {"rotate", "eval-fp", "weights", "handoff-integer", "eval-integer", "outliers"}
    held = [json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in RECORDS]
    assert any(stages <= {n.split("/")[1] for n in of if n.startswith("bytes/")} for of in held)
