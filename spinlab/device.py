"""The device and the arithmetic of a run: chosen once, at the start, never at import."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from spinlab import parallel
from spinlab.config import RuntimeConfig
from spinlab.errors import InputError

_AMPERE = (8, 0)  # compute capability: asynchronous copies, int8 products of 16 x 32
_owned: list[FileLock] = []  # held as long as this process lives
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether what learning computes has kernels there; float64 goes through torch."""
    return device.type == "cuda" and dtype != torch.float64


def choose_device(name: str) -> torch.device:
    """Return the device a config asks for; `auto` takes CUDA where there is one.

    A CUDA device that is named by number becomes the current one, where kernels are launched.
    Of several processes on a machine each has a device of its own, which `parallel.start` sets.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or index == ""):
        raise InputError(f"runtime.device={name} is unknown: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise InputError(f"runtime.device={name}: this machine has no such CUDA device, use cpu")
    if kind == "cuda" and parallel.launched() > 1:
        return _own_device(name)
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))
    return torch.device(name)


def _own_device(name: str) -> torch.device:
    """Return the CUDA device of this process, one of several."""
    if name != "cuda":
        raise InputError(f"runtime.device={name} is one device for all processes: use cuda")
    here, devices = parallel.launched_here(), torch.cuda.device_count()
    if here > devices:
        raise InputError(
            f"{here} processes need as many CUDA devices, and this machine has {devices}: lower "
            "--nproc-per-node, or use runtime.device=cpu"
        )
    return torch.device("cuda", parallel.local_rank())


def own_one(folder: Path) -> None:
    """Make one of this machine's CUDA devices the only one that this process sees, if any.

    It is the first that no other process owns by the folder, and is owned until this process ends.
    Must be called before CUDA is in use. Raises InputError where there are more processes.
    """
    if _owned or not (count := torch.cuda.device_count()):
        return
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    for name in names.split(",")[:count]:
        lock = FileLock(folder / f"cuda-{name}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _owned.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return
    raise InputError(
        f"each worker takes a CUDA device of its own, and this machine has {count}: use "
        f"hydra.launcher.n_jobs={count}"
    )


def choose_backend(name: str, device: torch.device) -> str:
    """Return the integer back end.

    `auto` is int8 on a CPU and exact floats on a GPU without Triton's kernels. With them it stays
    `auto`: the model decides (`QuantizedNetworks.integer`).
    """
    lacking = lacks_kernels(device)
    if name == "auto":
        if device.type == "cpu":
            return "cpu"
        return "torch" if lacking else "auto"
    if name == "cpu" and device.type != "cpu":
        raise InputError(f"runtime.backend=cpu cannot run on {device}: use auto or torch")
    if name == "triton" and lacking:
        raise InputError(f"runtime.backend=triton needs {lacking}: use auto or torch")
    return name


def lacks_kernels(device: torch.device) -> str | None:
    """Say what is missing for Triton's kernels to run on a device; None where nothing is."""
    if device.type != "cuda":
        return f"a CUDA device, and the device is {device}"
    if torch.version.cuda is None:  # ROCm calls its devices cuda, and counts capabilities anew
        return "NVIDIA's CUDA, and this torch is built without it"
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        has = ".".join(map(str, capability))
        return f"compute capability 8.0 or more, and {device} has {has}"
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    return None


def _keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory of up to 32 MiB instead of giving it back to the system.

    Weights and activations come and go at every step, and fresh pages cost a tenth of its time.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def set_arithmetic(runtime: RuntimeConfig) -> None:
    """Make results repeatable: full float32 products, deterministic kernels, a thread count."""
    # read by cuBLAS when its first handle is made; needed for repeatable sums
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # it would also fill every new tensor, which costs time and hides nothing here
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    _keep_freed_memory()
    if runtime.threads:
        torch.set_num_threads(runtime.threads)


@contextmanager
def float32_products_for(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices no finer than numbers of `dtype` need, that are made of them.

    For 16-bit ones a GPU takes TF32, several times as fast as float32: it keeps ten bits behind the
    point, as many as float16 and three more than bfloat16, and sums in float32. Everywhere else
    products stay whole.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype.itemsize == 2:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
