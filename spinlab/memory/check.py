"""Before anything is loaded: does the machine hold every stage?"""

import torch

from spinlab.errors import InputError
from spinlab.memory.machine import gib, left_on_device, left_on_host
from spinlab.memory.needs import Job, Need, needs
from spinlab.stages.pipeline import Pipeline


def check_memory(pipeline: Pipeline) -> None:
    """Raise InputError naming the first stage that this machine cannot hold.

    Of several processes most stages are the first one's alone: it may take the whole host.
    """
    device = pipeline.run.device
    of_device = left_on_device(device) if device.type == "cuda" else None
    job = Job(pipeline.config, pipeline.original.shape, device)
    check_needs(needs(job), left_on_host(swap=True, alone=True), of_device, device)


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
