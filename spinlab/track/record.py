"""The record: runs/<experiment>/<key>/record.json, the only source of a number."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinlab.config import Config, plain
from spinlab.stage import content_key, write_json

log = logging.getLogger(__name__)

SCHEMA = 1
_NOT_IN_KEY = ("paths", "tracker", "runtime")


def record_key(config: Config) -> str:
    """Identify an experiment by every setting that can change its numbers."""
    settings = {k: v for k, v in plain(config).items() if k not in _NOT_IN_KEY}
    return content_key({**settings, "backend": config.runtime.backend})


@dataclass
class Record:
    """Collect what a run did; `save` may be called at any time, so nothing finished is lost."""

    config: Config
    overrides: list[str]
    environment: dict
    stages: list[dict] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = "running"

    @property
    def key(self) -> str:
        return record_key(self.config)

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.runs) / self.config.name / self.key

    def as_json(self) -> dict[str, Any]:
        settings = plain(self.config)
        del settings["paths"]
        return {
            "schema": SCHEMA,
            "experiment": self.config.name,
            "key": self.key,
            "config": settings,
            "overrides": self.overrides,
            "environment": self.environment,
            "stages": self.stages,
            "metrics": self.metrics,
            "status": self.status,
        }

    def save(self) -> Path:
        """Write record.json and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "record.json"
        write_json(path, self.as_json())
        return path
