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


@triton.jit
def bring_lines(ptr, PDL: tl.constexpr):
    """Ask for the 128 bytes that each pointer lies in, so that the L2 has them after the wait.

    Called before `wait_for_inputs`, for what is read first after it. All read from the L2, so that
    it may be what another kernel still writes. To ask for more delays other programs' first lines.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
