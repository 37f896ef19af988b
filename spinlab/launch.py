"""What must be known or set before torch is imported, in environment variables.

Most of it is what torchrun tells each process that it starts. Nothing here imports torch.
"""

import os

from spinlab.errors import InputError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """Return how many processes torchrun started for this run; 1 without it.

    Raises InputError for variables that are left over from something else: the processes that they
    speak of would be waited for.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return 1
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE={size} is set without {', '.join(missing)}, as torchrun would set them: "
            "start with torchrun, or unset WORLD_SIZE"
        )
    if not 0 <= _number("RANK", 0) < size:
        raise InputError(
            f"RANK={os.environ['RANK']} is not below WORLD_SIZE={size}: start with torchrun, or "
            "unset both"
        )
    return size


def launched_here() -> int:
    """Return how many of them run on this machine: at least this one, at most all."""
    return max(1, min(_number("LOCAL_WORLD_SIZE", 1), launched()))


def local_rank() -> int:
    """Return this process's place among those of its machine, as torchrun counts them."""
    return _number("LOCAL_RANK", 0)


def is_first() -> bool:
    """Tell whether this process speaks."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def repeat_sums() -> None:
    """Ask MKL for the same bits whatever the alignment of memory: it listens when torch loads."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text} is no number: start with torchrun, or unset {name}")
    return int(text)
