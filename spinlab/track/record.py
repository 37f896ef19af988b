"""The record: runs/<experiment>/<key>/record.json, the only source of a number."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinlab import parallel
from spinlab.config import Config, plain
from spinlab.files import content_key, file_digest, write_json

SCHEMA = 1
_PRIVATE = ("paths.", "export.", "rotation.load=")  # overrides that name places
_NOT_IN_KEY = ("paths", "tracker", "runtime", "export")


def record_key(config: Config) -> str:
    """Identify an experiment by every setting that can change its numbers."""
    settings = {k: v for k, v in _public(config).items() if k not in _NOT_IN_KEY}
    return content_key({**settings, "backend": config.runtime.backend})


def _public(config: Config) -> dict[str, Any]:
    """Return the settings, with a loaded file named and identified by its content, not its path."""
    settings = plain(config)
    if config.rotation.load:
        file = Path(config.rotation.load).expanduser()
        digest = file_digest(file)[:16] if file.is_file() else "missing"
        settings["rotation"]["load"] = f"{file.name} {digest}"
    return settings


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
        settings = _public(self.config)
        del settings["paths"], settings["export"]
        return {
            "schema": SCHEMA,
            "experiment": self.config.name,
            "key": self.key,
            "config": settings,
            "overrides": [o for o in self.overrides if not o.startswith(_PRIVATE)],
            "environment": self.environment,
            "stages": self.stages,
            "metrics": self.metrics,
            "status": self.status,
        }

    def save(self) -> Path:
        """Write record.json and return its path; of several processes only the first one writes.

        A complete record is only replaced by a complete one: until then a run that repeats it
        writes unfinished.json beside it.
        """
        path, unfinished = self.folder / "record.json", self.folder / "unfinished.json"
        if not parallel.is_main():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.status != "complete" and _is_complete(path):
            write_json(unfinished, self.as_json())
            return unfinished
        write_json(path, self.as_json())
        unfinished.unlink(missing_ok=True)
        return path


def _is_complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "complete"
