"""Records as runs write them, without a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spinlab.bench.results import Results
from spinlab.bench.runners import Setting
from spinlab.config import Config
from spinlab.track.record import Record


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Return what writes the record of settings and metrics, with entries of it replaced."""

    def write(name: str, config: Config, metrics: dict[str, float], **entries) -> Path:
        record = Record(config, [], {}, {"calibration": "digest"}, status="complete")
        record.metrics = metrics
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record.as_json(), **entries}))
        return path

    return write


@pytest.fixture
def time_network(tmp_path) -> Callable[..., Path]:
    """Return what writes a record as `python -m spinlab.bench decode|prefill` does, untimed."""

    def write(phase: str, method: str | None, metrics: dict[str, float], **entries) -> Path:
        prompt = {"decode": 512, "prefill": 2048}[phase]
        setting = Setting("llama2_7b", None, prompt, 256, method)
        config = {"operations": "triton", "device": "cuda", **vars(setting)}
        results = Results(f"bench/{phase}/llama2_7b", config, None)
        record = results.record()
        record["metrics"] = {f"speedup/e2e/{phase}/{n}": value for n, value in metrics.items()}
        if phase == "decode":
            record["metrics"] |= {f"ratio/e2e/memory/{n}": 1 / v for n, v in metrics.items()}
        record["environment"]["gpu"] = "NVIDIA H200"
        path = tmp_path / "bench" / f"{phase}_llama2_7b_{method or 'hadamards'}_h200.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, **entries}))
        return path

    return write
