"""The record: runs/<experiment>/<key>/record.json, the only source of a number.

What a run is about is known by content, not by place: digests of model, texts and loaded rotations
make its key and stand in it, and of a path it keeps no more than the last part.
"""

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from spinlab import parallel
from spinlab.config import Config, plain
from spinlab.files import content_key, write_json, writing

log = logging.getLogger(__name__)

SCHEMA = 3  # 1 had no identity; 2 called the variant `integer` int4
_PRIVATE = ("paths.", "export.", "rotation.load=", "model.path=")  # overrides that name places
_NOT_IN_KEY = ("paths", "tracker", "runtime", "export", "sweep")
_PLACES = {  # settings that say where something lies: the identity says what it is
    "model": ("name", "path", "package", "file", "hub", "revision"),
    "data": ("calibration", "evaluation"),
    "rotation": ("load",),
}
_OF_RANDOM_WEIGHTS = ("architecture", "outlier_channels", "outlier_scale")
# a path ends before one of these; a blank is part of it where another folder follows
_WORD = r"[^\s/'\",;:()\[\]{}]+"
_START = r"(?:~\w*|\.\.?)?/+"
_PART = rf"{_WORD}(?:[ \t]+(?!{_START}){_WORD})*"
_PATH = re.compile(
    rf"(?P<url>(?!file:)\b[a-z][a-z0-9+.-]*://\S*)"
    rf"|(?:file:/+|(?<![\w./~]){_START})(?:{_PART}/+)*{_WORD}/*"
)
_GOES_ON = re.compile(rf"[,;:.!?]\s|\s{_START}")  # a string with that is a sentence


def record_key(config: Config, identity: dict[str, Any]) -> str:
    """Identify an experiment by all that can change its numbers: its settings and its contents.

    identity: what `spinlab.stages.pipeline.Pipeline.identity` tells of them.
    """
    settings = {k: v for k, v in _settings(config).items() if k not in _NOT_IN_KEY}
    for group, places in _PLACES.items():
        settings[group] = {k: v for k, v in settings[group].items() if k not in places}
    return content_key({**settings, "backend": config.runtime.backend, "identity": identity})


def without_folders(tree: Any) -> Any:
    """Return JSON-ready content in which paths from a root, a home or a dot are cut to their ends.

    A string that is such a path as a whole may hold any character. In a sentence it ends before a
    quote, a bracket or a mark, and its last part before a blank.
    """
    if isinstance(tree, dict):
        return {without_folders(key): without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_folders(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    start = _PATH.match(tree)
    if start and not start["url"] and not _GOES_ON.search(tree):
        return _last_part(tree)
    return _PATH.sub(lambda found: found["url"] or _last_part(found[0]), tree)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings without those of weights that nobody drew."""
    settings = plain(config)
    if config.model.weights != "random":
        for name in _OF_RANDOM_WEIGHTS:
            del settings["model"][name]
    return settings


@dataclass
class Record:
    """Collect what a run did; `save` may be called at any time, so nothing finished is lost."""

    config: Config
    overrides: list[str]
    environment: dict
    identity: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)  # which one ran: origin, family, sizes
    stages: list[dict] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = "running"
    mirrors: dict[str, str] = field(default_factory=dict)  # trackers that stopped, and why
    sweep: bool = False  # one of several runs of a command

    @property
    def key(self) -> str:
        return record_key(self.config, self.identity)

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.runs) / self.config.name / self.key

    @property
    def path(self) -> Path:
        return self.folder / "record.json"

    @property
    def model_name(self) -> str:
        """What the model that ran is called: a local folder by its name, or as the command says.

        The name in the settings may be that of a preset whose model the folder took the place of.
        """
        model = self.config.model
        named = any(o.lstrip("+").startswith("model.name=") for o in self.overrides)
        local = model.path and model.weights != "random"
        return _last_part(model.path or "") if local and not named else model.name

    def end(self, error: BaseException) -> None:
        """Set the status of a run that failed, or was interrupted from outside."""
        failed = f"failed: {type(error).__name__}: {error}"
        self.status = failed if isinstance(error, Exception) else "interrupted"

    def as_json(self) -> dict[str, Any]:
        settings = _settings(self.config)
        del settings["paths"], settings["export"], settings["sweep"]
        settings["model"]["name"] = self.model_name
        overrides = [o for o in self.overrides if not o.lstrip("+~").startswith(_PRIVATE)]
        content = {
            "schema": SCHEMA,
            "experiment": self.config.name,
            "key": self.key,
            "identity": self.identity,
            "model": self.model,
            "config": settings,
            "overrides": overrides,
            "environment": self.environment,
            "stages": self.stages,
            "metrics": self.metrics,
            "status": self.status,
            "mirrors": self.mirrors,
        }
        return without_folders(content)

    def kept(self) -> dict[str, Any] | None:
        """Return the complete record that stands here of the same settings, if it is made alike.

        Its inputs are the same, for they are in its key. Made alike: by what the keys of stages
        name, which are this code, the back end and the versions of two packages.
        """
        if _status(self.path) != "complete":
            return None
        saved, own = json.loads(self.path.read_text(encoding="utf-8")), self.as_json()
        alike = _means(saved.get("environment", {})) == _means(own["environment"])
        return saved if saved.get("config") == own["config"] and alike else None

    def save(self) -> Path:
        """Write record.json and return its path; of several processes only the first one writes.

        A complete record is only replaced by a complete one: until then a run that repeats it
        writes unfinished.json beside it. Raises InputError where the system refuses to write.
        """
        path, unfinished = self.path, self.folder / "unfinished.json"
        if not parallel.is_main():
            return path
        with writing(self.folder, "paths.runs"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "record.lock"):  # another run may end between two looks
                if self.status != "complete" and _status(path) == "complete":
                    write_json(unfinished, self.as_json())
                    return unfinished
                write_json(path, self.as_json())
                unfinished.unlink(missing_ok=True)
        return path


def _means(environment: dict[str, Any]) -> list[Any]:
    """Return what stages name in their keys of that which made a record."""
    packages = environment.get("packages", {})
    versions = [packages.get(name) for name in ("geoopt", "lm_eval")]
    return [environment.get("code"), environment.get("backend"), *versions]


def _status(path: Path) -> str | None:
    """Return the status of a record, if there is one; set a damaged one aside."""
    if not path.exists():
        return None
    try:
        status = json.loads(path.read_text(encoding="utf-8"))["status"]
        if isinstance(status, str):
            return status
        reason = f"its status is {status!r}"
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        reason = f"{type(error).__name__}: {error}"
    aside = path.with_name(f"{path.name}.damaged")
    log.warning("%s is damaged (%s) and is set aside as %s", path, reason, aside.name)
    os.replace(path, aside)
    return None
