"""Stages with a content-addressed cache: same inputs and settings, same folder, no second run.

    key = sha256(name, code, canonical JSON of everything the result depends on)

A stage works in `<key>.partial`, under a lock that dies with its process, and is renamed to
`<key>` once a manifest with digests stands in it. A killed stage finds its own progress again, a
torn or altered one is recomputed with a warning.
"""

import hashlib
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StageReport:
    """Tell how a stage went: seconds and peak memory are those of the run that made it."""

    name: str
    key: str
    cached: bool
    seconds: float
    peak_memory_bytes: int


@dataclass
class Stages:
    """Run stages in order and remember how each went."""

    root: Path
    reports: list[StageReport] = field(default_factory=list)

    def run(
        self, name: str, depends: Any, work: Callable[[Path], None], code: tuple[str, ...] = ()
    ) -> tuple[Path, str]:
        """Return the folder and key of a stage, doing `work(folder)` only if it is not there.

        `depends` is JSON-ready and names everything the result depends on: the keys of earlier
        stages, the stage's own settings, digests of its inputs. `code` names the modules and
        subpackages that make the result: their sources are part of the key, so that a changed
        method is never served from an old cache. `work` may leave progress in its folder and be
        called again on it after a kill.
        """
        key = content_key({"stage": name, "code": code_digest(code), "depends": depends})
        final = self.root / f"{name}-{key}"
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{name}-{key}.lock"):
            manifest = _intact(final)
            if manifest is None:
                manifest = self._make(name, key, final, work)
                cached = False
            else:
                cached = True
                log.info("%-12s cached %s (%.1f s saved)", name, key, manifest["seconds"])
        report = StageReport(name, key, cached, manifest["seconds"], manifest["peak_memory_bytes"])
        self.reports.append(report)
        return final, key

    @staticmethod
    def _make(name: str, key: str, final: Path, work: Callable[[Path], None]) -> dict:
        partial = final.with_name(final.name + ".partial")
        partial.mkdir(exist_ok=True)
        log.info("%-12s …", name)
        start = time.perf_counter()
        work(partial)
        seconds = time.perf_counter() - start
        files = {
            str(f.relative_to(partial)): file_digest(f)
            for f in sorted(partial.rglob("*"))
            if f.is_file()
        }
        manifest = {"files": files, "seconds": seconds, "peak_memory_bytes": peak_memory()}
        write_json(partial / _MANIFEST, manifest)
        os.replace(partial, final)
        log.info("%-12s done in %.1f s, peak %.2f GiB", name, seconds, peak_memory() / 2**30)
        return manifest

    def as_json(self) -> list[dict]:
        return [asdict(report) for report in self.reports]


@cache
def code_digest(names: tuple[str, ...]) -> str:
    """Digest the sources of modules and subpackages of spinlab, with what they compute on."""
    root = Path(__file__).parent
    files = [f for name in names for f in [root / f"{name}.py", *(root / name).rglob("*.py")]]
    sha = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    for file in sorted(f for f in files if f.is_file()):
        sha.update(file.read_bytes())
    return sha.hexdigest()


def content_key(content: Any) -> str:
    """Return 16 hex digits that identify JSON-ready content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON under a temporary name, then rename it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, sort_keys=True, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _intact(folder: Path) -> dict | None:
    """Return a finished stage's manifest; clear the folder away if it is torn or altered."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        sound = {"seconds", "peak_memory_bytes"} <= manifest.keys()
        if sound and all(file_digest(folder / name) == d for name, d in files.items()):
            return manifest
        reason = "a file was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("the cached %s is damaged (%s) and is computed again", folder.name, reason)
    shutil.rmtree(folder)
    return None
