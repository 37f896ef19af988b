"""Launch Triton kernels with little work for the host.

Triton's own launch looks at every argument anew, which for kernels with many can take the host
longer than they run. Here what a launch depends on is looked up in one table. How work is cut
depends on the GPU: `planning` collects what another one would be given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

_TILES = 200 * 1024  # bytes of shared memory for the tiles of two programs


@dataclass(frozen=True)
class GPU:
    """Hold what kernels are cut for; shared memory in bytes.

    shared: what one program may have; shared_by_all: what all programs of a multiprocessor have.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    shared_by_all: int

    @property
    def overlaps(self) -> bool:
        """Tell whether it can begin a kernel before the one that it waits for has ended."""
        return self.capability >= (9, 0)

    @property
    def loads_tiles(self) -> bool:
        """Tell whether it loads tiles by descriptors, and two programs of them fit."""
        return self.capability >= (9, 0) and self.shared_by_all >= _TILES


@dataclass(frozen=True)
class Launch:
    """Hold a launch that was not carried out; the arguments of `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Plan:
    gpu: GPU
    launches: list[Launch] = field(default_factory=list)


# of Triton's interpreter: Hopper, but small
_INTERPRETER = GPU((9, 0), multiprocessors=2, shared=227 * 1024, shared_by_all=228 * 1024)
_compiled: dict[tuple, Any] = {}  # by kernel, device, kinds of arguments, constants and options
_plan: _Plan | None = None


@contextmanager
def planning(gpu: GPU) -> Iterator[list[Launch]]:
    """Cut work for a GPU that need not be there, and collect launches in place of them.

    Tensors are the host's; what kernels would write is not written.
    """
    global _plan
    before, _plan = _plan, _Plan(gpu)
    try:
        yield _plan.launches
    finally:
        _plan = before


def gpu_of(device: torch.device) -> GPU:
    """Return the GPU that work on a device is cut for: Triton's interpreter has a small one."""
    if _plan is not None:
        return _plan.gpu
    return _gpu(device) if device.type == "cuda" else _INTERPRETER


@cache
def _gpu(device: torch.device) -> GPU:
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
    return GPU((found.major, found.minor), found.multi_processor_count, *shared)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    overlap: bool = True,
    **options: Any,
) -> None:
    """Run a Triton kernel on the current stream.

    arguments: those that are no constants, in the kernel's order; the constants follow them there.
    The kernel takes an additional constant PDL: whether to begin by `wait_for_inputs`.
    overlap: whether it may take its place before the kernel that it waits for has ended
    """
    if interpreted():
        kernel[grid](*arguments, **constants, PDL=False, **options)
        return
    device = -1 if _plan is not None else torch.cuda.current_device()
    pdl = overlap and (_overlaps(device) if _plan is None else _plan.gpu.overlaps)
    constants, options = {**constants, "PDL": pdl}, {**options, "launch_pdl": pdl}
    if _plan is not None:
        _plan.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    key = (
        id(kernel),  # kernels live as long as their modules
        device,
        tuple(map(_kind, arguments)),
        tuple(constants.values()),
        tuple(options.values()),
    )
    found = _compiled.get(key)
    if found is None:
        rest = kernel.arg_names[len(arguments) :]
        assert set(rest) == constants.keys(), "constants follow what are none"
        _compiled[key] = kernel[grid](*arguments, **constants, **options), rest
        return
    compiled, names = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in names])


@cache
def _overlaps(device: int) -> bool:
    return _gpu(torch.device("cuda", device)).overlaps


def settle(device: torch.device) -> None:
    """Wait for what the device was given: kernels may read before those before them have ended.

    For tensors that are made once, on first use. While a graph is captured there are none.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def compiled_for(x: torch.Tensor) -> bool:
    """Tell whether a kernel on such tensors is compiled, with what the interpreter lacks."""
    return x.is_cuda or _plan is not None


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter."""
    import triton  # pyright: ignore[reportMissingImports]

    if _plan is not None:
        return False

    return triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]


def _kind(argument: Any) -> Any:
    """Return all that Triton compiles for in an argument: types, and numbers it treats apart."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    if isinstance(argument, float):
        return float
    return argument.base.dtype, tuple(argument.block_shape)  # a descriptor of tiles


def power_of_two(n: int) -> int:
    """Return the smallest power of two from n on, the size of a kernel's tile; 0 for nothing."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
