"""What memory is left to this process, and how to tell that it ran out."""

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from spinlab import parallel
from spinlab.errors import InputError

_GROUPS = Path("/sys/fs/cgroup")
# limit, use, and what of the use is only a cache of files, by version of control groups
_FILES = {
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_cache",)),
}
_TOLD = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate|bad_alloc"
    r"|STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
    re.IGNORECASE,
)


def memory_for(device: torch.device, swap: bool = True) -> int:
    """Return the bytes that this process may take on a device, with what it has taken already."""
    if device.type == "cuda":
        return left_on_device(device)
    return left_on_host(swap) + psutil.Process().memory_info().rss


def left_on_device(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, or that this process keeps for itself."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def left_on_host(swap: bool = True, alone: bool = False) -> int:
    """Return the bytes of the host's memory that this process may still take.

    That is the least of what the machine has left, for each of its processes here, of what their
    control groups leave, and of the address space (`ulimit -v`). swap: count it as memory, for
    what fits there runs, if slowly. alone: what this process may take while the others here wait.
    """
    left = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    shared = [left, *_of_groups(_GROUPS, Path("/proc/self/cgroup"))]
    found = min(shared) // (1 if alone else parallel.launched_here())
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        found = min(found, most - psutil.Process().memory_info().vms)
    return found


def _of_groups(root: Path, own: Path) -> Iterator[int]:
    """Yield what the limits of this process's control groups leave; nothing where there are none.

    A group is bound by those above it. In a container the groups above its own are not seen, and
    its own may be the root.
    """
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    for kind, path in paths.items():
        if kind not in _FILES:
            continue
        folder = root / kind
        group = folder / path.lstrip("/")
        for place in (group, *group.parents):
            if place.is_relative_to(folder):
                yield from _of_group(place, *_FILES[kind])


def _of_group(place: Path, limit: str, used: str, caches: tuple[str, ...]) -> Iterator[int]:
    """Yield what one control group leaves, if it has a limit."""
    try:
        most, use = ((place / name).read_text(encoding="utf-8").strip() for name in (limit, used))
        lines = (place / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:  # not seen from inside a container
        return
    if most != "max":
        kept = {name: int(count) for name, count in (line.split() for line in lines)}
        yield int(most) - int(use) + sum(kept.get(name, 0) for name in caches)


@contextmanager
def memory_told() -> Iterator[None]:
    """Turn an error that says that memory ran out into an InputError that names the cure."""
    try:
        yield
    except Exception as error:
        if sentence := out_of_memory(error):
            raise InputError(sentence) from error
        raise


def out_of_memory(error: BaseException) -> str | None:
    """Return a sentence for an error that says that memory ran out; None for any other."""
    if isinstance(error, torch.OutOfMemoryError):
        place = "the GPU's memory"
    elif isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        place = "the host's memory"
    elif isinstance(error, RuntimeError) and _TOLD.search(str(error)):
        place = "the GPU's memory" if "CUDA" in str(error) else "the host's memory"
    else:
        return None
    return (
        f"{place} ran out: what is finished is kept, so run the same again with more memory, or "
        "with a smaller model, batch or window"
    )


def gib(count: int) -> str:
    gib = count / 2**30
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.2g}"
