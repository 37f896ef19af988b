"""Before anything is loaded: does the machine hold every stage?"""

import torch

from spinlab.errors import InputError
from spinlab.machine import gib, left_on_device, left_on_host
from spinlab.memory.needs import Job, Need, needs


def check_memory(job: Job) -> None:
    """Raise InputError naming the first stage to run that this machine cannot hold.

    Of several processes most stages are the first one's alone: it may take the whole host.
    """
    of_device = left_on_device(job.device) if job.device.type == "cuda" else None
    check_needs(needs(job), left_on_host(alone=True), of_device, job.device)


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
