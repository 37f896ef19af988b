"""Before anything is loaded: does the machine hold every stage?"""

import logging
import shutil
from operator import attrgetter
from pathlib import Path

import torch

from spinlab.errors import InputError
from spinlab.machine import gib, left_on_device, left_on_host
from spinlab.memory.job import Job, Need
from spinlab.memory.needs import disk, needs

log = logging.getLogger(__name__)


def check_memory(job: Job) -> None:
    """Raise InputError naming the first stage to run that this machine cannot hold.

    Of several processes most stages are the first one's alone: it may take the whole host. So too
    where the disk of the cache does not hold what they write.
    """
    of_device = left_on_device(job.device) if job.device.type == "cuda" else None
    stages = needs(job)
    if stages:
        host, device = (max(stages, key=attrgetter(side)) for side in ("host", "device"))
        log.info(
            "%-12s at least %s GiB of %s (%s), %s GiB of the host (%s) and %s GiB of disk",
            "memory",
            *(gib(device.device), job.device, device.stage.rstrip(",")),
            *(gib(host.host), host.stage.rstrip(","), gib(disk(job))),
        )
    check_needs(stages, left_on_host(alone=True), of_device, job.device)
    _check_disk(disk(job), Path(job.config.paths.cache))


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


def _check_disk(count: int, folder: Path) -> None:
    """Hold bytes against what is free where a folder is, or will be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if count > (free := shutil.disk_usage(there).free):
        raise InputError(
            f"the stages write at least {gib(count)} GiB to paths.cache={folder}, where "
            f"{gib(free)} GiB are free: make room, or take another folder"
        )


def _check(need: Need, count: int, has: int, kind: str) -> None:
    if count > has:
        raise InputError(
            f"{need.stage} needs at least {gib(count)} GiB of {kind}, and {gib(max(has, 0))} GiB "
            f"are left: use {need.cure}"
        )
