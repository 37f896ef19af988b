"""How fast a device multiplies and is given numbers, by short measurements; how durations read.

A kind of work is a dtype of products by torch's name, `tf32` for float32 ones of 16-bit networks on
a GPU, `int8`, or `moved`: bytes on their way from the host's memory to a GPU.
"""

import time
from collections.abc import Callable

import torch

from spinlab.device import float32_products_for

TF32, INT8, MOVED = "tf32", "int8", "moved"
WORTH_TELLING = 5  # seconds
TINY = {"cpu": 1e11, "cuda": 1e14}  # operations that are over before anyone asks
# rows and columns of the matrices that are multiplied: enough for a device to be at its best
_SIDE = {"cpu": 1024, "cuda": 4096}
_SIDE_OF_FLOAT64 = {"cpu": 512, "cuda": 2048}  # which some GPUs hardly multiply
_COPIED = 2**26  # bytes
_ENOUGH, _TRIES = 0.1, 3  # seconds, behind which nothing is tried again, and how often at most


def rate_of(kind: str, device: torch.device) -> float:
    """Measure how much of a kind of work a device does in a second: operations, or bytes.

    It takes a tenth of a second or two. Bytes are multiplied twice as fast as 16-bit
    numbers on NVIDIA's tensor cores, and on a CPU by its own instructions.
    """
    if kind == MOVED:
        return _moving(device)
    if kind == INT8:
        if device.type == "cuda":
            return 2 * rate_of("bfloat16", device)
        return max(_of_bytes(_SIDE["cpu"]), rate_of("float32", device))
    side = (_SIDE_OF_FLOAT64 if kind == "float64" else _SIDE)[device.type]
    shape = (side, side, side)
    if kind != TF32:
        return product_rate(shape, getattr(torch, kind), device)
    with float32_products_for(torch.bfloat16, device):
        return product_rate(shape, torch.float32, device)


def product_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations per second of products (rows, n) (n, columns), the best of a few.

    shape: (rows, n, columns).
    """
    rows, n, columns = shape
    generator = torch.Generator(device).manual_seed(0)  # zeros would be faster than numbers are
    x = torch.randn(rows, n, device=device, generator=generator).to(dtype)
    matrix = torch.randn(n, columns, device=device, generator=generator).to(dtype)
    return 2 * rows * n * columns / _best(lambda: x @ matrix)


def _of_bytes(side: int) -> float:
    """Measure operations per second of a CPU's products of bytes, right or not."""
    x = torch.ones(side, side, dtype=torch.int8)
    product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    return 2 * side**3 / _best(lambda: product(x, x.t()))


def _moving(device: torch.device) -> float:
    """Measure bytes per second from the host's memory, as checkpoints lie there, to a device."""
    numbers = torch.ones(_COPIED, dtype=torch.uint8)
    return _COPIED / _best(lambda: numbers.to(device, copy=True))


def _best(work: Callable[[], torch.Tensor]) -> float:
    """Return the seconds of the fastest of a few calls, behind one that loads libraries."""
    taken: list[float] = []
    for _ in range(1 + _TRIES):
        start = time.perf_counter()
        work().view(-1)[0].item()  # waits for a GPU
        taken.append(time.perf_counter() - start)
        if sum(taken[1:]) > _ENOUGH:
            break
    return min(taken[1:])


def duration(seconds: float) -> str:
    """Write a duration as people say it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds:.0f} s"
