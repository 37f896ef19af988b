"""What the stages write at least, and whether disks have room for it."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from spinlab.errors import InputError
from spinlab.export.targets import place_of
from spinlab.machine import gib
from spinlab.memory.job import FLOAT32, FLOAT64, Job


class Write(NamedTuple):
    """Say how many bytes go to a folder, which may not be there yet, and what names it."""

    setting: str
    folder: Path
    count: int


def writes(job: Job) -> list[Write]:
    """Return what stages and exports write at least."""
    cache = Path(job.config.paths.cache)
    found = [Write(f"paths.cache={cache}", cache, disk(job))]
    if path := job.config.export.artefact:
        count = job.packed + job.rest * job.size
        found.append(Write(f"export.artefact={path}", place_of(path), count))
    return found


def disk(job: Job) -> int:
    """Return the bytes that the stages write to the cache at least.

    Rounding on text keeps layers apart until the last is finished; of an original that others are
    compared with the head is kept, and what it read. A GGUF file is kept as it was converted.
    """
    found = job.numbers * FLOAT32 * job.has("model")
    found += sum(job.statistics.values()) * job.has("statistics")
    rotating = "rotate", "factors", "learn", "factors-learned"
    found += _rotations(job) * sum(job.has(stage) for stage in rotating)
    found += job.packed * job.has("weights-rtn")
    if job.has("weights"):
        found += job.packed * (2 if job.config.rounded_on_text else 1)
    if job.has("eval-fp") and job.config.eval.compares:
        tokens = job.windows * job.config.eval.window
        found += (job.end + tokens * job.map.hidden) * job.size
    return found


def check_disks(found: Iterable[Write]) -> None:
    """Raise InputError where a disk has no room for all that goes there."""
    disks: dict[int, list[Write]] = {}
    for write in found:
        disks.setdefault(_there(write.folder).stat().st_dev, []).append(write)
    for together in disks.values():
        count = sum(write.count for write in together)
        if count > (free := shutil.disk_usage(_there(together[0].folder)).free):
            raise InputError(
                f"the stages write at least {gib(count)} GiB to "
                f"{' and '.join(write.setting for write in together)}, where {gib(free)} GiB are "
                "free: make room, or take another folder"
            )


def _there(folder: Path) -> Path:
    """Return a folder, or the one that it will be made in."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _rotations(job: Job) -> int:
    """Return the bytes of what is fused, if it is drawn and in no file that may lack it."""
    rotation = job.config.rotation
    of_heads = sum(layer.attention.value_dim**2 for layer in job.map.layers)
    numbers = {"r1": job.map.hidden**2, "r2": of_heads}
    numbers["latents"] = sum(width**2 for width in job.map.latents.values())
    drawn = [] if rotation.load else [n for n in numbers if getattr(rotation, n) != "none"]
    return FLOAT64 * sum(numbers[name] for name in drawn)
