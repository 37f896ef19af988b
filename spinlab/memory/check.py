"""Before anything is loaded: does the machine hold every stage, and how long will they take?"""

import logging
from collections import Counter
from collections.abc import Callable
from operator import attrgetter

import torch

from spinlab.errors import InputError
from spinlab.machine import gib, left_on_device, left_on_host
from spinlab.memory.disk import check_disks, writes
from spinlab.memory.job import Job, Need
from spinlab.memory.needs import needs
from spinlab.memory.work import works
from spinlab.speed import MOVED, TINY, WORTH_TELLING, duration, rate_of

log = logging.getLogger(__name__)


def check_memory(job: Job) -> None:
    """Raise InputError naming the first stage to run that this machine cannot hold.

    Of several processes most stages are the first one's alone: it may take the whole host. So too
    where a disk does not hold what they write. Time is told and refuses nothing.
    """
    of_device = left_on_device(job.device) if job.device.type == "cuda" else None
    stages, written = needs(job), writes(job)
    check_needs(stages, left_on_host(alone=True), of_device, job.device)
    check_disks(written)
    if stages:  # how fast the device is is measured where there is room for it
        told, of_disk = _most(stages, job) + _time(job), gib(sum(w.count for w in written))
        log.info("%-12s at least %s and %s GiB of disk", "memory", told, of_disk)


def _most(stages: list[Need], job: Job) -> str:
    """Say what the largest needs are: of device and host, or of both where they are one memory."""
    sides: dict[str, Callable[[Need], int]] = {
        str(job.device): attrgetter("device"),
        "the host": attrgetter("host"),
    }
    if job.device.type == "cpu":
        sides = {"memory": lambda need: need.host + need.device}
    found = {side: max(stages, key=of) for side, of in sides.items()}
    told = [
        f"{gib(sides[side](need))} GiB of {side} ({need.stage.rstrip(',')})"
        for side, need in found.items()
    ]
    return ", ".join(told)


def _time(job: Job) -> str:
    """Say how long all stages take at least, and which the longest, if that is worth telling.

    How fast the device is is measured only then.
    """
    found = works(job)
    counts = sum((work.operations for work in found), Counter())
    if counts.total() - counts[MOVED] < TINY[job.device.type]:
        return ""
    rates = {kind: rate_of(kind, job.device) for kind in counts}
    taken = [work.seconds(rates) for work in found]
    if sum(taken) < WORTH_TELLING:
        return ""
    longest, measured = found[taken.index(max(taken))].stage, job.config.eval
    asked = measured.tasks and job.has(*(f"eval-{name}" for name in measured.task_variants))
    return f", {duration(sum(taken))}{' without zero-shot' if asked else ''} ({longest})"


def check_needs(
    stages: list[Need], of_host: int, of_device: int | None, device: torch.device
) -> None:
    """Hold stages against the bytes that are left of the host's memory and of the device's.

    of_device: None where the device is the host itself.
    """
    for need in stages:
        if of_device is None:
            _check(need, need.host + need.device, of_host, "memory")
        else:
            _check(need, need.host, of_host, "host memory")
            _check(need, need.device, of_device, f"memory of {device}")


def _check(need: Need, count: int, has: int, kind: str) -> None:
    if count > has:
        raise InputError(
            f"{need.stage} needs at least {gib(count)} GiB of {kind}, and {gib(max(has, 0))} GiB "
            f"are left: use {need.cure}"
        )
