"""How one kernel begins while another ends, on Hopper and later."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the kernels before this one; let those behind it take its place as it ends.

    Nothing may be written before, and nothing read but what the host has waited for once
    (`launch.settle`): matrices of rotations. Whoever comes next waits in the same way, for all.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]
