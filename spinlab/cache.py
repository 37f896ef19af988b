"""Stages with a content-addressed cache: same inputs and settings, same folder, no second run.

    key = sha256(name, code, canonical JSON of everything the result depends on)

A stage works in `<key>.partial`, under a lock that dies with its process, and is renamed to
`<key>` once a manifest with digests stands in it. A killed stage finds again what it left in
`progress`, which goes only after the rename; a torn or altered one is recomputed with a warning.

Of several processes (`spinlab.parallel`) the first one looks, locks, works and finishes, and the
others go on with what it found; all of them work on a stage that is done together.
"""

import ctypes
import gc
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from spinlab import parallel
from spinlab.code import code_digest
from spinlab.collector import leave_modules
from spinlab.entries import final_of, lock_of, partial_of
from spinlab.files import content_key, file_digest, is_temporary, sync, write_json, writing
from spinlab.heartbeat import heartbeat
from spinlab.held import Hold

log = logging.getLogger(__name__)

PROGRESS = "progress"  # the subfolder of what a killed stage goes on with: no part of its result
_MANIFEST = "manifest.json"
_MEASURED = ("seconds", "peak_memory_bytes", "peak_device_bytes")


class Artifact(NamedTuple):
    """Tell where a stage keeps what it made, and the key that it is known by."""

    path: Path
    key: str


@dataclass(frozen=True)
class StageReport:
    """Tell how a stage went: seconds and peak memory are those of the run that made it.

    peak_memory_bytes: of its process so far. peak_device_bytes: of tensors on its GPU during the
    stage, 0 without one. Of several processes these are the first's.
    """

    name: str
    key: str
    cached: bool
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int = 0


class NotCached(Exception):
    """Say that a stage is not in the cache, to who only wants to know."""


@dataclass
class Cache:
    """Run stages in order and remember how each went, and where its result lies."""

    root: Path
    reports: list[StageReport] = field(default_factory=list)
    _at_work: str | None = field(default=None, init=False)
    _works: bool = field(default=True, init=False)
    _hold: Hold | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        leave_modules()

    def run(
        self,
        name: str,
        depends: Any,
        work: Callable[[Path], None],
        together: bool = False,
    ) -> Artifact:
        """Return what a stage has made, doing `work(folder)` only if it is not there.

        `depends` is JSON-ready and names everything the result depends on: the keys of earlier
        stages, the stage's own settings, digests of its inputs. The code of the module that `work`
        stands in, with all that it imports, is part of the key, so that a changed method is never
        served from an old cache (`spinlab.code`). What `work` leaves in the folder's subfolder
        `PROGRESS` is there when it is called again after a kill. With `together` every process
        calls `work` on the same folder, where no two write the same file; else the first one calls
        it by itself. A stage that is asked for again is where it was. Raises InputError where the
        system refuses to write.
        """
        # what the first process asks for while it works alone, the others would wait for forever
        assert self._at_work is None, f"{name} must be asked for before {self._at_work} starts"
        key = content_key({"stage": name, "code": code_digest(work.__module__), "depends": depends})
        key = parallel.share(key)
        final = final_of(self.root, name, key)
        if any(report.name == name and report.key == key for report in self.reports):
            return Artifact(final, key)
        if not self._works and not parallel.share(final.is_dir()):
            raise NotCached(name)
        with writing(self.root, "paths.cache"), self._lock(name, final):
            manifest = parallel.share(_intact(final) if parallel.is_main() else None)
            cached = manifest is not None
            if cached:
                log.info("%-12s cached %s (%.1f s saved)", name, key, manifest["seconds"])
            elif not self._works:
                raise NotCached(name)
            else:
                manifest = self._make(name, final, work, together)
        measured = (manifest.get(part, 0) for part in _MEASURED)  # the last is newer than the rest
        self.reports.append(StageReport(name, key, cached, *measured))
        return Artifact(final, key)

    @contextmanager
    def only_cached(self) -> Iterator[None]:
        """Work on no stage: one that is not in the cache raises NotCached."""
        before, self._works = self._works, False
        try:
            yield
        finally:
            self._works = before

    @contextmanager
    def _lock(self, name: str, final: Path) -> Iterator[None]:
        """Keep other runs from this stage; the first process does so for all.

        From the first stage on this process holds the cache: what it found there stays.
        """
        if not parallel.is_main():
            yield
            return
        self._hold = self._hold or Hold(self.root)
        lock = FileLock(lock_of(final))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%-12s waits for another run of %s", name, final.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _make(
        self, name: str, final: Path, work: Callable[[Path], None], together: bool
    ) -> dict[str, Any]:
        """Do the work and return its manifest, the same on all processes."""
        partial = partial_of(final)
        log.info("%-12s …", name)
        start = time.perf_counter()
        if _on_gpu():
            torch.cuda.reset_peak_memory_stats()
        if parallel.is_main():
            _clear(partial)
        with self._working(name), heartbeat(name):
            if together:
                parallel.barrier()
                work(partial)
                parallel.barrier()
            elif parallel.is_main():
                with parallel.alone():
                    work(partial)
        seconds = time.perf_counter() - start
        _give_back_memory()  # what the stage freed would stand beside what the next one takes
        return parallel.share(_finish(name, partial, final, seconds) if parallel.is_main() else {})

    @contextmanager
    def _working(self, name: str) -> Iterator[None]:
        self._at_work = name
        try:
            yield
        finally:
            self._at_work = None

    def as_json(self) -> list[dict]:
        return [asdict(report) for report in self.reports]


def _clear(partial: Path) -> None:
    """Leave nothing of an earlier attempt but its progress."""
    progress = partial / PROGRESS
    progress.mkdir(parents=True, exist_ok=True)
    for left in [*partial.iterdir(), *progress.iterdir()]:
        if (left.parent == progress and not is_temporary(left)) or left == progress:
            continue
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _finish(name: str, partial: Path, final: Path, seconds: float) -> dict[str, Any]:
    """Write the manifest of what was made and give its folder the final name."""
    made = [f for child in partial.iterdir() if child.name != PROGRESS for f in _tree(child)]
    files = {str(f.relative_to(partial)): file_digest(f) for f in made if f.is_file()}
    device = torch.cuda.max_memory_allocated() if _on_gpu() else 0
    measured = dict(zip(_MEASURED, (seconds, peak_memory(), device), strict=True))
    for path in made:
        sync(path)
    write_json(partial / _MANIFEST, manifest := {"files": files, **measured})
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(final / PROGRESS)
    gpu = f", on the GPU {device / 2**30:.2f}" if device else ""
    log.info("%-12s done in %.1f s, peak %.2f GiB%s", name, seconds, peak_memory() / 2**30, gpu)
    return manifest


def _tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


def _on_gpu() -> bool:
    """Tell whether this process has work on a GPU, without beginning any there."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back_memory() -> None:
    """Give freed memory back to the system, which steps of one stage keep for each other."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _intact(folder: Path) -> dict | None:
    """Return a finished stage's manifest; clear the folder away if it is torn or altered."""
    if not folder.is_dir():
        return None
    if (progress := folder / PROGRESS).exists():  # of a run that was killed after the rename
        shutil.rmtree(progress)
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
