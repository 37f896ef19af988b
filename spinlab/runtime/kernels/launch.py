"""Launch Triton kernels with little work for the host.

Triton's own launch looks at every argument anew, which for kernels with many can take the host
longer than they run. Here what a launch depends on is looked up in one table.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

_compiled: dict[tuple, Any] = {}  # by kernel, device, kinds of arguments, constants and options


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
    pdl = overlap and _overlaps(torch.cuda.current_device())
    constants, options = {**constants, "PDL": pdl}, {**options, "launch_pdl": pdl}
    key = (
        id(kernel),  # kernels live as long as their modules
        torch.cuda.current_device(),
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
    """Tell whether a device can begin a kernel before the one that it waits for has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many a GPU has; 2 of Triton's interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def settle(device: torch.device) -> None:
    """Wait for what the device was given: kernels may read before those before them have ended.

    For tensors that are made once, on first use. While a graph is captured there are none.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter."""
    import triton  # pyright: ignore[reportMissingImports]

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
