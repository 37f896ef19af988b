"""Rotations of inputs in blocks, on CUDA: DuQuant's dual transforms, and blocks alone.

A rotation of a 16-bit input is taken in float32, as its definition takes it, by tensor cores. Its
matrix is a sum of two of the input's dtype where that holds every row to 2^-16, else float32 in
products of three TF32 ones. What a dual transform has between its rotations is float32: a sum of
two numbers of bfloat16, as is the second matrix. Rounded factors are one matrix of 16 bits, and of
inputs in bfloat16 what is between is bfloat16. It lies with the tokens of a channel side by side,
so that the channels are dealt in whole pieces of memory.
"""

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from spinlab.rotation.inputs import ScaledDual
from spinlab.runtime.kernels.launch import gpu_of, interpreted, launch, power_of_two, settle

_NARROWEST, _WIDEST = 16, 128  # what a product takes; narrower blocks are filled up
_FEW, _STEP = 16, 64  # tokens of a tile
_PIECE = 64  # numbers of a block that one program writes, but for many tokens on large GPUs
_MANY = 128  # tokens; more are many
_IN_TURN = 8  # tiles that one program takes, at most
_SIDE_BY_SIDE = 2  # programs of a multiprocessor that write 128 numbers; of fewer there are more
_MOST = 8  # programs of a multiprocessor
_SHARED = 160 * 1024  # bytes that a program of a whole block may take
_TILE = 8192  # numbers that one program norms, at least


@dataclass(frozen=True)
class _Pass:
    """One rotation: (2 or 1, k, b, b) that sum up to its matrices, behind a deal of channels.

    gives: the dtype of what it hands on to a second one; None for the last.
    """

    parts: torch.Tensor
    order: torch.Tensor | None
    gives: torch.dtype | None

    @property
    def light(self) -> bool:
        """Whether its matrix is one of 16 bits, which leaves room for other things."""
        return len(self.parts) == 1 and self.parts.dtype.itemsize == 2


@dataclass(frozen=True)
class _Cut:
    """Say how work is cut: `tiles` of `step` tokens, and blocks in pieces that programs write.

    stages: tiles that are on their way, many: tiles that a program takes in turn
    """

    step: int
    tiles: int
    block: int
    piece: int
    stages: int
    many: int


_passes: WeakKeyDictionary[ScaledDual, dict[tuple[torch.dtype, torch.device], list[_Pass]]] = (
    WeakKeyDictionary()
)


def has_block_kernel(x: torch.Tensor, rotation: ScaledDual) -> bool:
    """Tell whether `turned` takes inputs such as x: (..., width), of 16 bits.

    Blocks have at most 128 numbers.
    """
    return x.dtype.itemsize == 2 and bool(_passes_of(rotation, x))


def turned(
    x: torch.Tensor,
    rotation: ScaledDual,
    up: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    epsilon: float | None = None,
) -> torch.Tensor:
    """Return the transform of x: (tokens, width), in x's dtype.

    up: (tokens, width), for silu(x)·up in place of x. epsilon: for x/rms(x) in its place, times a
    gain (width,) if there is one; squares of one token alone are added in another order.
    """
    first, *rest = _passes_of(rotation, x)
    y = _turned(x, first, x.dtype, len(x), up, gain, epsilon)
    return _turned(y, rest[0], x.dtype, len(x)) if rest else y


def _inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return 1 / rms(x) of tokens x (tokens, width), in float32: (tokens,)."""
    from spinlab.runtime.kernels.producers.triton_blocks import inverse_kernel

    tokens, width = x.shape
    block = power_of_two(width)
    step = max(1, _TILE // block)
    found = torch.empty(tokens, dtype=torch.float32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if tokens:
        constants = {"WIDTH": width, "STEP": step, "BLOCK": block}
        arguments = x, found, tokens, x.stride(0), epsilon
        launch(inverse_kernel, (-(-tokens // step),), arguments, constants, num_warps=4)
    return found


def _turned(
    x: torch.Tensor,
    by: _Pass,
    dtype: torch.dtype,
    tokens: int,
    up: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    epsilon: float | None = None,
) -> torch.Tensor:
    """Return one rotation of x: (tokens, width), in a dtype.

    What goes on, and an x that is dealt, is (width, tokens), filled up to whole tiles of tokens.
    """
    from spinlab.runtime.kernels.producers.triton_blocks import blocks_kernel

    width = x.shape[1 if by.order is None else 0]
    parts, matrices, b = by.parts.shape[:3]
    x = x if x.stride(1) == 1 else x.contiguous()
    up = up if up is None or up.stride(1) == 1 else up.contiguous()
    other = up if up is not None else x if gain is None else gain
    assert other.stride(-1) == 1, "a gain lies in one piece: it is read before a kernel waits"
    cut = _cut(tokens, width, by, x.device)
    shape = (tokens, width) if by.gives is None else (width, cut.tiles * cut.step)
    found = torch.empty(*shape, dtype=by.gives or dtype, device=x.device)
    if not tokens:
        return found
    normed = epsilon is not None
    alone = normed and tokens == 1  # for one, every program finds it sooner than one does for all
    inverse = _inverse_rms(x, epsilon) if epsilon is not None and not alone else x
    arguments = (
        x, other, inverse, x if by.order is None else by.order, by.parts, found, tokens,
        x.stride(0), 0 if up is None else up.stride(0), found.stride(0), cut.many, epsilon or 0.0,
    )  # fmt: skip
    constants = {
        "GATED": up is not None, "NORMED": normed, "ALONE": alone, "GAIN": gain is not None,
        "DEALT": by.order is not None, "ACROSS": by.gives is not None, "PARTS": parts,
        "SHARED": matrices == 1, "BLOCKS": width // b, "B": b, "BLOCK": cut.block,
        "PIECE": cut.piece, "STEP": cut.step, "WHOLE": power_of_two(width), "STAGES": cut.stages,
        "AS_FLOATS": interpreted(),  # which multiplies no bfloat16
    }  # fmt: skip
    grid = -(-cut.tiles // cut.many), width // b * -(-b // cut.piece)
    launch(blocks_kernel, grid, arguments, constants, num_warps=4)
    return found


def _cut(tokens: int, width: int, by: _Pass, device: torch.device) -> _Cut:
    """Return how the work for tokens of some width is cut."""
    b, step = by.parts.shape[-1], _FEW if tokens <= _FEW else _STEP
    tiles, block = -(-tokens // step), max(_NARROWEST, power_of_two(b))
    piece, stages = _piece(tokens, block, by.light, device)
    pieces, multiprocessors = width // b * -(-b // piece), gpu_of(device).multiprocessors
    many = _tiles_a_program(tiles, pieces, piece, multiprocessors)
    return _Cut(step, tiles, block, piece, stages, many)


def _piece(tokens: int, block: int, light: bool, device: torch.device) -> tuple[int, int]:
    """Return how many numbers of a block a program writes, and how many tiles it loads ahead.

    A whole block of 128 reads what comes in, and gates it, once; but other GPUs than the large ones
    from Hopper on have too few registers or too little to share, and of few tokens too few programs
    run. light: as of a pass.
    """
    if tokens <= _MANY or not _is_large(device):
        return min(_PIECE, block), 1
    return block, 3 if light else 2


def _is_large(device: torch.device) -> bool:
    gpu = gpu_of(device)
    return gpu.capability >= (9, 0) and gpu.shared >= _SHARED


@lru_cache(maxsize=256)  # asked at every launch
def _tiles_a_program(tiles: int, pieces: int, piece: int, multiprocessors: int) -> int:
    """Return how many tiles of tokens a program takes in turn with its matrix.

    Programs run in rounds, of as many as a GPU holds; the fewest tiles one after the other are
    aimed at, and a matrix counts as one.
    """
    places = min(_SIDE_BY_SIDE * _WIDEST // piece, _MOST) * multiprocessors

    def length(many: int) -> int:
        return -(-(-(-tiles // many) * pieces) // places) * (many + 1)

    return min(range(min(tiles, _IN_TURN), 0, -1), key=length, default=1)


def _passes_of(rotation: ScaledDual, x: torch.Tensor) -> list[_Pass]:
    """Return the rotations of a transform in turn, for inputs such as x; none without a kernel."""
    known = _passes.setdefault(rotation, {})
    if (x.dtype, x.device) not in known:
        known[x.dtype, x.device] = _made(rotation, x)
        settle(x.device)
    return known[x.dtype, x.device]


def _made(rotation: ScaledDual, x: torch.Tensor) -> list[_Pass]:
    if rotation.dual is None:
        return []
    factors, found = rotation.factors(), []
    short = rotation.rounded and x.dtype == torch.bfloat16
    for place, factor in enumerate(factors):
        if factor.blocks.shape[-1] > _WIDEST:
            return []
        # float32 behind a deal of channels has a range that bfloat16 has, too
        dtype = x.dtype if factor.order is None else torch.bfloat16
        parts = _halves(factor.blocks, dtype)
        parts = factor.blocks[None].float() if parts is None else parts
        if rotation.rounded and not parts[1:].any():
            parts = parts[:1]
        order = None if factor.order is None else factor.order.to(x.device, torch.int32)
        between = x.dtype if short else torch.float32
        gives = between if place + 1 < len(factors) else None
        found.append(_Pass(parts.to(x.device).contiguous(), order, gives))
    return found


def _halves(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return (2, k, b, b) of a 16-bit dtype with float64 matrices (k, b, b) as their sum.

    None where a row is off by more than 2^-16 of its largest entry: float16 has no small numbers,
    and no large ones.
    """
    high = matrices.to(dtype)
    low = (matrices - high.double()).to(dtype)
    off = (high.double() + low.double() - matrices).abs().amax(-1)
    exact = (off <= 2**-16 * matrices.abs().amax(-1)).all()
    return torch.stack((high, low)) if exact else None
