"""What makes quantized inputs, each operation in one pass over memory, on CUDA.

`spinlab.runtime.kernels.producers.reference` is the definition. On the same finite floats levels
are equal bit for bit; what a norm, a gate or a rotation computes may differ by its own rounding.
NaNs are dropped: their token is scaled by its other values.
"""

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from spinlab.fakequant.activations import Transform
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation
from spinlab.runtime.kernels.formats import TokenLevels, into_int8
from spinlab.runtime.kernels.launch import compiled_for, gpu_of, launch, power_of_two, settle
from spinlab.runtime.kernels.producers.blocks import has_block_kernel, turned

_TILE = 4096  # numbers that one program quantizes, at least
_WIDEST = 32768  # of a token that one program holds
_FACTOR = 256  # the largest order of a Hadamard factor that a program holds

_operands: WeakKeyDictionary[
    OnlineRotation, dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]]
] = WeakKeyDictionary()


def has_rotation_kernel(
    x: torch.Tensor, rotation: Transform | None, quantizer: TokenQuantizer
) -> bool:
    """Tell whether operations take inputs such as x, (..., width), with what turns them.

    A token is quantized as a whole: it has at most 32768 numbers. Online rotations are those by
    signs, of 16-bit numbers, with factors up to 256 that the shared memory of x's device holds;
    groups are powers of two within a row. Rotations in blocks are those of `has_block_kernel`. For
    what is left there is the rotation itself, followed by `quantize`.
    """
    if rotation is None:
        return x.dtype != torch.float64 and x.shape[-1] <= _WIDEST
    if isinstance(rotation, ScaledDual):
        return x.shape[-1] <= _WIDEST and has_block_kernel(x, rotation)
    return isinstance(rotation, OnlineRotation) and _has_sign_kernel(x, rotation, quantizer)


def _has_sign_kernel(x: torch.Tensor, rotation: OnlineRotation, quantizer: TokenQuantizer) -> bool:
    rows, columns, _ = _factors(rotation)
    block = _pieces(rows, columns)[2]
    group = quantizer.group_size % rotation.width
    return (
        rotation.flat
        and x.dtype.itemsize == 2
        and max(rows, columns) <= _FACTOR
        and _held(rotation, rows, columns) <= gpu_of(x.device).shared
        and (not group or (block == columns and group & (group - 1) == 0))
        and group <= block  # within a row: four rows to a group came out wrong
    )


def quantize(x: torch.Tensor, quantizer: TokenQuantizer, *, summed: bool = True) -> TokenLevels:
    """Quantize x: (..., width), per token and group; the leading dimensions become tokens.

    summed: whether there are sums of levels, here as in what follows
    """
    found = _empty(x, quantizer, summed)
    rows = x.reshape(-1, quantizer.group_size or x.shape[-1])  # every group is a row of its own
    _launch_rows(rows, None, found, TokenQuantizer(quantizer.format, 0, quantizer.clip_ratio))
    return found


def norm_quantize(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    epsilon: float,
    quantizer: TokenQuantizer,
    rotation: ScaledDual | None = None,
    *,
    summed: bool = True,
) -> TokenLevels:
    """Quantize x/rms(x)·gain as transformers' RMSNorm rounds it, rotated where there is a rotation.

    x: (..., width), gain: (width,). The normed token is rounded to x's dtype before the gain, which
    is taken in that dtype.
    """
    x = x.reshape(-1, x.shape[-1])
    if rotation is not None:
        return quantize(turned(x, rotation, gain=gain, epsilon=epsilon), quantizer, summed=summed)
    found = _empty(x, quantizer, summed)
    _launch_rows(x, gain, found, quantizer, epsilon=epsilon, normed=True)
    return found


def gate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor,
    rotation: Transform | None,
    quantizer: TokenQuantizer,
    *,
    summed: bool = True,
) -> TokenLevels:
    """Quantize silu(gate)·up, rotated where there is a rotation. gate, up: (..., width)."""
    gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    if isinstance(rotation, ScaledDual):
        return quantize(turned(gate, rotation, up=up), quantizer, summed=summed)
    found = _empty(gate, quantizer, summed)
    if rotation is None:
        _launch_rows(gate, up, found, quantizer, gated=True)
    else:
        _launch_rotation(gate, up, rotation, found, quantizer)
    return found


def rotate_quantize(
    x: torch.Tensor, rotation: Transform, quantizer: TokenQuantizer, *, summed: bool = True
) -> TokenLevels:
    """Quantize x: (..., width), after the rotation."""
    x = x.reshape(-1, x.shape[-1])
    if isinstance(rotation, ScaledDual):
        return quantize(turned(x, rotation), quantizer, summed=summed)
    found = _empty(x, quantizer, summed)
    _launch_rotation(x, None, rotation, found, quantizer)
    return found


def _empty(x: torch.Tensor, quantizer: TokenQuantizer, summed: bool) -> TokenLevels:
    """Return room for the levels of x: (..., width)."""
    width = x.shape[-1]
    tokens, groups = x.numel() // width, width // (quantizer.group_size or width)
    levels = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    # one piece of memory: to ask for it costs the host more than the kernel that fills it
    scale, zero, *sums = torch.empty(2 + summed, tokens, groups, dtype=torch.int32, device=x.device)
    return TokenLevels(levels, scale.view(torch.float32), zero, sums[0] if summed else None)


def _pointers(found: TokenLevels) -> tuple[torch.Tensor, ...]:
    """Return what a kernel writes; where there are no sums another tensor stands for them."""
    return tuple(found.zero if part is None else part for part in found)


def _launch_rows(
    x: torch.Tensor,
    other: torch.Tensor | None,
    found: TokenLevels,
    quantizer: TokenQuantizer,
    epsilon: float = 0.0,
    normed: bool = False,
    gated: bool = False,
) -> None:
    """Quantize rows x: (rows, width); other is a gain for `normed` and what is up for `gated`."""
    from spinlab.runtime.kernels.producers.triton import rows_kernel

    rows, width = x.shape
    assert width <= _WIDEST, f"a program holds at most {_WIDEST} numbers of a token"
    x = x if x.stride(1) == 1 else x.contiguous()
    if other is not None:
        other = other if other.stride(-1) == 1 else other.contiguous()
    group = quantizer.group_size or width
    block, many = power_of_two(group), power_of_two(width // group)
    step = max(1, _TILE // (block * many))
    if not rows:
        return
    arguments = (
        x, x if other is None else other, *_pointers(found), rows, x.stride(0),
        other.stride(0) if gated and other is not None else 0, epsilon,
        float(quantizer.clip_ratio),
    )  # fmt: skip
    constants = {
        "GATED": gated, "NORMED": normed, "GAIN": normed and other is not None, "STEP": step,
        "GROUPS": width // group, "GROUP": group, "MANY": many, "BLOCK": block,
        "SUMS": found.sums is not None, **_constants(quantizer, x),
    }  # fmt: skip
    # few warps a program, many programs: while one waits for its token, others compute
    warps = 4 if step * many * block <= 16384 else 8
    grid = (-(-rows // step),)
    launch(rows_kernel, grid, arguments, constants, num_warps=warps, enable_fp_fusion=False)


def _launch_rotation(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    rotation: Transform,
    found: TokenLevels,
    quantizer: TokenQuantizer,
) -> None:
    from spinlab.runtime.kernels.producers.triton_hadamard import rotate_kernel

    assert isinstance(rotation, OnlineRotation), "blocks are turned apart"
    assert has_rotation_kernel(gate, rotation, quantizer), "ask has_rotation_kernel first"
    rows, columns, factor = _factors(rotation)
    first, second, block = _pieces(rows, columns)
    left, right = _signs(rotation, gate)
    tokens, gated = len(gate), up is not None
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    up = gate if up is None else up if up.stride(1) == 1 else up.contiguous()
    if not tokens:
        return
    programs = _programs(gate.device, _held(rotation, rows, columns))
    arguments = (
        gate, up, left, right, *_pointers(found), tokens, gate.stride(0), up.stride(0), factor,
        float(quantizer.clip_ratio),
    )  # fmt: skip
    constants = {
        "GATED": gated, "ROWS": rows, "LEFT": len(rotation.left) > 1, "B": columns, "FIRST": first,
        "SECOND": second, "BLOCK": block,
        "GROUP": quantizer.group_size % rotation.width, "GROUPS": found.scale.shape[1],
        "SUMS": found.sums is not None, **_constants(quantizer, gate),
    }  # fmt: skip
    options = _options((first + second) * block, block)
    grid = (min(tokens, programs),)
    launch(rotate_kernel, grid, arguments, constants, **options, enable_fp_fusion=False)


def _constants(quantizer: TokenQuantizer, x: torch.Tensor) -> dict[str, Any]:
    """Return what kernels know of a quantizer; asm and fused products are left to a GPU."""
    format = quantizer.format
    assert isinstance(format, IntegerFormat) and format.is_int8, "levels are bytes"
    assert isinstance(quantizer.clip_ratio, float | int), "the clip ratio is no longer learned"
    return {
        "LOW": format.lowest, "HIGH": format.highest, "SYMMETRIC": format.symmetric,
        "SHIFT": into_int8(format), "FUSED": compiled_for(x),
    }  # fmt: skip


def _signs(rotation: OnlineRotation, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors as a program holds them for tokens x: with zeros outside, in whole rows.

    left: (n, n) for all rows that are held, right: (block, block), transposed. What several blocks
    share stands along their diagonals. They stay for as long as the rotation, in CUDA graphs too.
    """
    known = _operands.setdefault(rotation, {})
    if (x.dtype, x.device) not in known:
        rows, columns, _ = _factors(rotation)
        first, second, block = _pieces(rows, columns)
        left, right = rotation.factors(x.dtype, x.device)
        known[x.dtype, x.device] = (
            _along_diagonal(left, rows, first + second),
            _along_diagonal(right.mT, columns, block),
        )
        settle(x.device)
    return known[x.dtype, x.device]


def _along_diagonal(factor: torch.Tensor, order: int, size: int) -> torch.Tensor:
    """Return I ⊗ factor, of an order, in the corner of zeros: (size, size)."""
    found = factor.new_zeros(size, size)
    found[:order, :order] = torch.block_diag(*[factor] * (order // len(factor)))
    return found


@lru_cache(maxsize=256)
def _factors(rotation: OnlineRotation) -> tuple[int, int, float]:
    """Return rows and columns that tokens are read as, and the scale of a product of signs.

    Without a left factor blocks are rows; narrow ones share a row, up to what a product likes.
    """
    rows, columns = rotation.blocks * len(rotation.left), len(rotation.right)
    scale = (rotation.left[0, 0] * rotation.right[0, 0]).abs().item()
    while len(rotation.left) == 1 and columns < 64 and rows % 2 == 0:
        rows, columns = rows // 2, 2 * columns
    return rows, columns, scale


def _pieces(rows: int, columns: int) -> tuple[int, int, int]:
    """Return in which two powers of two rows are held (or in one), and columns in one."""
    whole = max(16, power_of_two(rows))
    rest = max(16, power_of_two(rows - whole // 2))
    two = whole > 16 and whole // 2 + rest < whole
    block = max(16, power_of_two(columns))
    return (whole // 2, rest, block) if two else (whole, 0, block)


@lru_cache(maxsize=256)
def _held(rotation: OnlineRotation, rows: int, columns: int) -> int:
    """Return the bytes of shared memory of a program: both factors' signs and a token."""
    first, second, block = _pieces(rows, columns)
    left = 0 if len(rotation.left) == 1 else (first + second) ** 2
    return 2 * (left + block**2 + (first + second) * block)


def _programs(device: torch.device, held: int) -> int:
    """Return how many programs a device runs at once."""
    gpu = gpu_of(device)
    return min(gpu.shared_by_all // (held + 1024), 4) * gpu.multiprocessors


def _options(size: int, block: int) -> dict[str, Any]:
    """Return how to compile for tokens of `size` numbers, read in columns of `block`.

    A warp takes 16 columns of a product. Where 128 registers are enough for 8 warps, two programs
    share a multiprocessor: while one waits for memory, the other multiplies.
    """
    if block < 64:
        return {"num_warps": 1 if size <= 1024 else 2, "num_stages": 1}
    warps = 4 if block == 64 or size <= 4096 else 8
    return {"num_warps": warps, "num_stages": 1, "maxnreg": 128 if size <= 2048 * warps else None}
