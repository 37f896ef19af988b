"""Several processes, one for each device: the one place that knows torch.distributed.

    torchrun --nproc-per-node=N -m spinlab +experiment=NAME

Every process runs the same program on the same settings. What must happen once is done by the
first of them while the others wait; what is shared out is done by all together. A process by
itself goes through the same code, where none of these functions does anything.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spinlab.launch import launched, launched_here, local_rank

__all__ = [
    "alone",
    "barrier",
    "begin_gather",
    "begin_scatter",
    "begin_share",
    "begin_sum",
    "in_turn",
    "is_main",
    "launched",
    "launched_here",
    "local_rank",
    "part",
    "rank",
    "share",
    "share_tensors",
    "start",
    "stop",
    "sum_",
    "world",
]

T = TypeVar("T")

# the first process may work alone for that long while the others wait for its word
_PATIENCE = timedelta(hours=72)
_HOST = torch.device("cpu")
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def start(device: str) -> None:
    """Meet the other processes that torchrun started, if any; device: cpu, or cuda for all.

    Values and barriers go through the host on either, so that no GPU waits for hours.
    """
    if launched() == 1 or dist.is_initialized():
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)


def stop() -> None:
    """Part from the other processes, once all of them are here."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Act as a world of one process inside the context."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone.get() else 1


def rank() -> int:
    """Return this process's number among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Tell whether this is the first process: the one that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    sum_(torch.zeros(1))


def share(value: T) -> T:
    """Return the first process's value, which must be picklable, to all."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=_HOST)
    return box[0]


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a contiguous tensor over all processes, in place, and return it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def share_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors of the same shapes and dtypes by the first process's, bit for bit."""
    for tensor in tensors if world() > 1 else ():
        if tensor.numel():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # as bytes: of any dtype
            tensor.copy_(whole)


@torch.no_grad()
def begin_share(tensor: torch.Tensor, source: int) -> list[dist.Work]:
    """Begin to overwrite a contiguous tensor by one process's, bit for bit.

    Return what to wait for before anyone reads it. All processes begin in the same order.
    """
    if world() == 1:
        return []
    work = dist.broadcast(tensor.view(-1).view(torch.uint8), src=source, async_op=True)
    return [] if work is None else [work]


@torch.no_grad()
def begin_sum(tensor: torch.Tensor, target: int) -> list[dist.Work]:
    """Begin to add up a contiguous tensor over all processes in one of them, in place.

    Elsewhere it is of no use afterwards. Return what to wait for, as `begin_share` does.
    """
    if world() == 1:
        return []
    work = dist.reduce(tensor, dst=target, async_op=True)
    return [] if work is None else [work]


@torch.no_grad()
def begin_scatter(shares: torch.Tensor | None, room: torch.Tensor, source: int) -> list[dist.Work]:
    """Begin to fill a contiguous room (...) by this process's share of one process's.

    shares: (processes, ...), contiguous; None in all other processes. Return what to wait for, as
    `begin_share` does.
    """
    if world() == 1:
        assert shares is not None, "the one process has what it sends"
        room.copy_(shares[0])
        return []
    parts = None if shares is None else list(shares.unbind())
    work = dist.scatter(room, parts, src=source, async_op=True)
    return [] if work is None else [work]


@torch.no_grad()
def begin_gather(share: torch.Tensor, rooms: torch.Tensor | None, target: int) -> list[dist.Work]:
    """Begin to bring the contiguous shares (...) of all processes to one of them.

    rooms: where they go, (processes, ...), contiguous; None in all other processes. Return what to
    wait for, as `begin_share` does.
    """
    if world() == 1:
        assert rooms is not None, "the one process has room for what it is sent"
        rooms[0].copy_(share)
        return []
    parts = None if rooms is None else list(rooms.unbind())
    work = dist.gather(share, parts, dst=target, async_op=True)
    return [] if work is None else [work]


def in_turn(begun: Iterable[tuple[T, list[dist.Work]]], most: int) -> Iterator[T]:
    """Yield what was begun once its work is done, in order; at most so many are under way."""
    under_way: deque[tuple[T, list[dist.Work]]] = deque()
    for item in begun:
        under_way.append(item)
        if len(under_way) == most:
            yield _finished(under_way)
    while under_way:
        yield _finished(under_way)


def _finished(under_way: deque[tuple[T, list[dist.Work]]]) -> T:
    """Wait for the oldest."""
    found, works = under_way.popleft()
    for work in works:
        work.wait()
    return found


def part(rows: torch.Tensor) -> torch.Tensor:
    """Return this process's part of rows (n, ...): a contiguous run, of one row more or less."""
    return rows.tensor_split(world())[rank()]
