"""Random operands of benchmarks, drawn on the device in the forms that kernels take."""

import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.pack import unpack_nibbles
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.layouts import GridLayout
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
    batch: int, kv_heads: int, capacity: int, head_dim: int, generator: torch.Generator
) -> PackedRows:
    """Draw the 4-bit keys or values of a full cache, about normal in distribution."""
    device = generator.device
    rows = empty_rows(batch, kv_heads, capacity, GridLayout(KV_GRID, head_dim), device)
    assert rows.zero is not None
    shape = (batch, kv_heads, capacity)
    rows.packed.copy_(
        torch.randint(256, rows.packed.shape, dtype=torch.uint8, generator=generator, device=device)
    )
    rows.scale.copy_(torch.rand(shape, generator=generator, device=device) * 0.2 + 0.2)
    rows.zero.copy_(torch.randint(6, 10, shape, generator=generator, device=device))
    return rows
