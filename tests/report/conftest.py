"""Records as runs write them, without a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
