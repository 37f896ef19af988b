"""Random operands of benchmarks, drawn on the device in the forms that kernels take."""

import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.pack import unpack_nibbles
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.base import PackedLayout
from spinlab.kv.layouts import GridLayout, LevelsLayout
from spinlab.runtime.kernels.formats import PackedWeight
from spinlab.runtime.kernels.kv.rows import PackedRows, empty_rows

# as the experiments quantize inputs, keys and values
QUANTIZER = TokenQuantizer(IntegerFormat(bits=4, symmetric=False))
KV_GRID = IntegerFormat(bits=4, symmetric=False)


def random_weight(
    out_features: int, in_features: int, blocks: int, generator: torch.Generator
) -> PackedWeight:
    """Draw a symmetric 4-bit weight with one scale per output, on the generator's device.

    blocks: the input's groups. Every level is equally likely; outputs of normal inputs have about
    their variance.
    """
    device = generator.device
    shape = (out_features, in_features // 2)
    packed = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=device)
    spread = torch.rand(out_features, 1, generator=generator, device=device) * 0.4 + 0.8
    levels = unpack_nibbles(packed.unflatten(1, (blocks, -1)), signed=True)
    return PackedWeight(
        packed=packed,
        scale=spread / (4.6 * in_features**0.5),
        zero=None,
        sums=levels.sum(2, dtype=torch.int32),
        chunk=in_features // blocks,
    )


def random_floats(
    *shape: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Draw normal floats on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


def random_rows(
    batch: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    generator: torch.Generator,
    layout: PackedLayout | None = None,
) -> PackedRows:
    """Draw the keys or values of a full cache, about normal in distribution.

    layout: how a head is coded, by 4 bits on a grid unless it is given.
    """
    layout, device = layout or GridLayout(KV_GRID, head_dim), generator.device
    rows = empty_rows(batch, kv_heads, capacity, layout, device)
    shape, places = (batch, kv_heads, capacity), rows.packed.shape
    nibbles = torch.randint(256, places, dtype=torch.uint8, generator=generator, device=device)
    spread = torch.rand(shape, generator=generator, device=device) + 1
    if isinstance(layout, LevelsLayout):  # of directions, whose lengths are those of numbers
        many, scale = len(layout.levels.first), spread * head_dim**0.5
    else:
        assert isinstance(layout, GridLayout)
        many = layout.grid.highest - layout.grid.lowest + 1
        scale = spread * 3 / (many - 1)
    rows.packed.copy_(nibbles & (many - 1) * 0x11)
    rows.scale.copy_(scale)
    if rows.zero is not None:
        first = 3 * many // 8  # about the middle
        zero = torch.randint(first, many - first, shape, generator=generator, device=device)
        rows.zero.copy_(zero)
    return rows
