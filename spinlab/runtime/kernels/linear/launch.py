"""Products with packed weights on a GPU: the twin of `spinlab.runtime.kernels.linear.reference`.

Up to _FEW tokens the weights' bytes are the time, and the columns of a tile are split among
programs; above, the operations are, and programs stay on their multiprocessor and take tile after
tile. GPUs before Hopper load no tiles by descriptors, and small ones after it have no room for
them: there the first kernel takes many tokens too. Weights rest packed in all: no expanded copy is
made.
"""

from functools import cache
from typing import Any

import torch

from spinlab.errors import InputError
from spinlab.runtime.kernels.formats import PackedWeight, TokenLevels
from spinlab.runtime.kernels.launch import gpu_of, interpreted, launch, power_of_two
from spinlab.runtime.kernels.linear.reference import dequantize

_FEW = 128  # tokens
_WIDEST_GROUP = 1 << 15  # of inputs, as they are quantized
_WIDEST = 1 << 17  # columns whose products, 16 times and of bytes, fit into 32 bits
_FOUR_STEPS = 89 * 1024  # bytes of a program for 64 tokens that loads four steps ahead
_LONG = 10  # steps of a part that is worth being added up, for 64 tokens
_PROGRAMS = 2  # per multiprocessor: one unpacks while the other multiplies


def linear(
    inputs: TokenLevels,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return inputs · weightᵀ + bias: (tokens, out) in `dtype`, as the reference does.

    The kernel that multiplies adds the outputs to others, where there are some.

    Raises InputError for shapes that `why_not` names.
    """
    _check(weight)
    tokens, width = inputs.levels.shape
    groups = inputs.scale.shape[1]
    assert width == weight.in_features, f"inputs of width {width} meet {weight.in_features}"
    assert weight.blocks % groups == 0, f"{groups} groups meet a weight of {weight.blocks} blocks"
    assert all(t is None or t.is_contiguous() for t in inputs), "inputs lie in one piece each"
    out = torch.empty(tokens, weight.out_features, dtype=dtype, device=inputs.levels.device)
    if tokens == 0:
        return out
    some = weight.scale  # stands for what is not there
    sums, zero = some, some
    if weight.zero is not None:
        sums, zero = inputs.sums_of(weight.blocks), weight.zero
    pointers = (
        inputs.scale, inputs.zero, sums, weight.scale, zero, weight.sums,
        some if bias is None else bias,
        out if added is None else added.contiguous(),
    )  # fmt: skip
    shape: dict[str, Any] = {
        "HALF": weight.chunk // 2,
        "BLOCKS": weight.blocks,
        "INPUT_GROUPS": groups,
        "WEIGHT_GROUPS": weight.groups,
        "ZEROS": weight.zero is not None,
        "BIAS": bias is not None,
        "ADDED": added is not None,
    }
    few = tokens <= _FEW or not gpu_of(out.device).loads_tiles
    (_decode if few else _prefill)(inputs.levels, weight, out, pointers, shape)
    return out


def linear16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x · weightᵀ + bias for inputs that are not quantized: (tokens, out) in x's dtype.

    added: as for `linear`. Of many tokens the operations are the time, and these are 16-bit ones:
    there the weight is expanded for the length of the call.
    """
    _check(weight)
    tokens, width = x.shape
    assert width == weight.in_features, f"inputs of width {width} meet {weight.in_features}"
    assert weight.blocks == weight.groups, "a weight for inputs in groups meets none"
    if tokens > _FEW:
        out = torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
        return out if added is None else out.add_(added)
    from spinlab.runtime.kernels.linear.triton_decode import decode16_kernel

    out = x.new_empty(tokens, weight.out_features)
    if tokens == 0:
        return out
    tile = _decode16_tile(tokens, weight, x.dtype)
    tiles = _ceil(weight.out_features, tile["BN"])
    part, count = _workspace(out, tiles, tile, torch.float32)
    some = weight.scale
    arguments = (
        x.contiguous(), weight.packed, out, weight.scale,
        some if weight.zero is None else weight.zero, some if bias is None else bias,
        x if added is None else added.contiguous(), part, count, tokens, weight.out_features,
    )  # fmt: skip
    warps = tile.pop("num_warps")
    constants = {
        "IN": width, "HALF": weight.chunk // 2, "BLOCKS": weight.blocks,
        "ZEROS": weight.zero is not None, "BIAS": bias is not None, "ADDED": added is not None,
        **tile, "ASM": not interpreted(),
    }  # fmt: skip
    launch(decode16_kernel, (tiles, tile["SPLIT"]), arguments, constants, num_warps=warps)
    return out


def why_not(width: int, out_features: int, blocks: int) -> str | None:
    """Say why there is no kernel for a weight (out, width) cut into blocks; None where there is.

    Rows of packed weights and of results must start at multiples of 16 bytes.
    """
    if width >= _WIDEST:
        return f"an input of {width} numbers overflows 32-bit sums (fewer than {_WIDEST} fit)"
    if width // blocks > _WIDEST_GROUP:
        return f"a group of {width // blocks} inputs fits into no program ({_WIDEST_GROUP} do)"
    if width % 32 or out_features % 8:
        return f"{width} inputs and {out_features} outputs are no multiples of 32 and 8"
    half = width // blocks // 2
    if blocks > 1 and (half < 32 or half & (half - 1)):
        return f"groups of {2 * half} are no power of two from 64 on"
    return None


def _check(weight: PackedWeight) -> None:
    reason = why_not(weight.in_features, weight.out_features, weight.blocks)
    if reason is not None:
        raise InputError(f"there is no GPU kernel for this weight: {reason}; use the reference")


def _prefill(
    levels: torch.Tensor, weight: PackedWeight, out: torch.Tensor, pointers: tuple, shape: dict
) -> None:
    from spinlab.runtime.kernels.linear.triton import prefill_kernel

    tile = _prefill_tile(len(levels), weight)
    warps, bm, bn, bk = tile.pop("num_warps"), tile["BM"], tile["BN"], tile["BK"]
    tiles = _ceil(len(levels), bm) * _ceil(weight.out_features, bn)
    programs = min(tiles, _PROGRAMS * gpu_of(levels.device).multiprocessors)
    arguments = (
        _tiles(levels, bm, bk),
        _tiles(weight.packed, bn, bk),
        _tiles(out, bm, bn),
        *pointers, len(levels), weight.out_features,
    )  # fmt: skip
    constants = {**shape, **tile, "PROGRAMS": programs, "ASM": not interpreted()}
    # a program takes so much room that the kernel before it would end more slowly
    options = {"overlap": False, "num_warps": warps, "enable_fp_fusion": False}
    launch(prefill_kernel, (programs,), arguments, constants, **options)


def _tiles(x: torch.Tensor, rows: int, columns: int) -> Any:
    """Describe a contiguous matrix that kernels read or write tile by tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore

    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, columns])


def _prefill_tile(tokens: int, weight: PackedWeight) -> dict[str, int]:
    """Choose the tile of a program. Of several blocks it holds two sums, so it takes half."""
    several = weight.blocks > 1
    bk = min(64, weight.chunk // 2) if several else 64
    return {
        "BM": 64 if several else 128,
        "BN": 128,
        "BK": bk,
        "GROUP": 16,
        "STAGES": 2 if several else 3,
        "num_warps": 4,
    }


def _decode(
    levels: torch.Tensor, weight: PackedWeight, out: torch.Tensor, pointers: tuple, shape: dict
) -> None:
    from spinlab.runtime.kernels.linear.triton_decode import decode_kernel

    tokens = len(levels)
    tile = _decode_tile(tokens, weight) if tokens <= _FEW else _many_tile(weight)
    tiles = _ceil(weight.out_features, tile["BN"]) * _ceil(tokens, tile["BM"])
    dtype = torch.int32 if weight.blocks == 1 else torch.float32
    part, count = _workspace(out, tiles, tile, dtype)
    arguments = (
        levels, weight.packed, out, *pointers, part, count, tokens, weight.out_features,
    )  # fmt: skip
    warps = tile.pop("num_warps")
    constants = {"IN": weight.in_features, **shape, **tile, "ASM": not interpreted()}
    grid = (tiles, tile["SPLIT"])
    launch(decode_kernel, grid, arguments, constants, num_warps=warps, enable_fp_fusion=False)


def _decode_tile(tokens: int, weight: PackedWeight) -> dict[str, int]:
    """Choose the tile of a program for quantized inputs."""
    bm, gpu = max(16, power_of_two(tokens)), gpu_of(weight.packed.device)
    programs = 2 if bm <= 64 else 1
    tile = {"BM": bm, "BN": 64, "BK": 128, "STAGES": 5 if bm <= 32 else 3, "num_warps": 4}
    tile = _split(tile, weight, programs, steps=_LONG if bm == 64 else 2)
    if bm == 64 and _density(tile, weight) <= 2 <= gpu.shared_by_all // _FOUR_STEPS:
        tile["STAGES"] = 4
    return {**tile, "GROUP": 0}


def _many_tile(weight: PackedWeight) -> dict[str, int]:
    """Choose the tile of a program for many tokens, where tiles are not loaded by descriptors.

    By what the compiler makes of it for sm_80 to sm_120 (`spinlab.bench compiled`): a thread keeps
    all but 16 bytes at most in registers, and two programs or more run side by side.
    """
    bk = min(64, max(32, power_of_two(weight.chunk // 2)))
    return {"BM": 64, "BN": 128, "BK": bk, "SPLIT": 1, "GROUP": 16, "STAGES": 3, "num_warps": 4}


def _decode16_tile(tokens: int, weight: PackedWeight, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile of a program for inputs in floats, which take more room and operations."""
    bm = max(16, power_of_two(tokens))
    few = bm <= 32
    bk = 128 if dtype.itemsize == 2 and few else 32
    stages = 4 if dtype.itemsize == 2 or few else 2  # more of 128 tokens find no room on Ada
    tile = _split({"BM": bm, "BN": 32, "BK": bk, "STAGES": stages, "num_warps": 2}, weight, 6)
    if dtype.itemsize == 2 and bm == 16 and _density(tile, weight) <= 4:
        tile["STAGES"] = 5  # fewer programs keep as much on its way if each asks for more
    return tile


def _density(tile: dict[str, int], weight: PackedWeight) -> float:
    """Return how many programs there are to a multiprocessor, before columns are split or after."""
    tiles = _ceil(weight.out_features, tile["BN"]) * tile.get("SPLIT", 1)
    return tiles / gpu_of(weight.packed.device).multiprocessors


def _split(
    tile: dict[str, int], weight: PackedWeight, programs: int, steps: int = 2
) -> dict[str, int]:
    """Split columns while that leaves at most so many programs to a multiprocessor.

    steps: that each part has at least, of BK columns of both halves, once every third
    multiprocessor has a program; before, two are enough
    """
    half = weight.chunk // 2
    tile["BK"] = min(tile["BK"], max(32, power_of_two(half)))  # 32: the least of a product
    density = _density(tile, weight)
    parts = weight.blocks * _ceil(half, tile["BK"])
    split = 1
    while split < 8 and 2 * split * density <= programs:
        if 2 * split * (steps if 3 * split * density >= 1 else 2) > parts:
            break
        split *= 2
    return {**tile, "SPLIT": split}


def _workspace(
    out: torch.Tensor, tiles: int, tile: dict[str, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for the parts of every tile, and its counters."""
    if tile["SPLIT"] == 1:
        return out, out  # neither is used
    size = tile["SPLIT"] * tiles * tile["BN"] * tile["BM"]
    part = torch.empty(size, dtype=dtype, device=out.device)
    stream = torch.cuda.current_stream(out.device).cuda_stream if out.is_cuda else 0
    return part, _counters(out.device, stream, max(4096, power_of_two(tiles)))


@cache
def _counters(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """Return counters that every launch leaves at zero; those of a stream wait for each other."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def _ceil(number: int, parts: int) -> int:
    return (number + parts - 1) // parts
