"""All blocks of a linear in one launch against their definition, bit for bit."""

import numpy as np
import pytest
import torch

from spinlab.formats.quantizer import Encoded
from spinlab.runtime.kernels.matmul import blocks, blocks_triton, cublas, outputs_for, reference
from spinlab.runtime.kernels.matmul.blocks import Tables


def operands(
    tokens: int, out: int, blocks: int, groups: int, block: int, seed: int = 0
) -> tuple[Encoded, Tables, torch.Tensor]:
    """Return signed inputs, a weight with zero points, and a bias."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

    levels = integers(-128, 128, tokens, blocks * block).to(torch.int8)
    levels[0], scale = -128, torch.randn(tokens, groups, 1, generator=g).exp()
    inputs = Encoded(levels, scale, integers(-128, 128, tokens, groups, 1))
    weight = integers(-128, 128, out, blocks * block).to(torch.int8)
    weight[0] = -128
    sums = weight.int().view(out, blocks, block).sum(2, dtype=torch.int32).T.contiguous()
    scale = 2.0**-13 * torch.randn(blocks, 1, out, generator=g).exp()
    zero = integers(-128, 128, blocks, 1, out)
    return inputs, Tables(weight, sums, scale, zero), torch.randn(out, generator=g)


def moved(device: torch.device, found: tuple) -> tuple:
    return type(found)(*(None if t is None else t.to(device) for t in found))


@pytest.mark.parametrize(
    ("tokens", "out", "count", "groups", "block"),
    [
        (70, 130, 3, 3, 16),
        (3, 24, 4, 2, 32),
        (65, 129, 2, 1, 20),
        (1, 8, 1, 1, 576),
        (5, 136, 2, 2, 72),
        (9, 16, 1, 1, 33),
    ],
)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_launch_gives_what_blocks_add_up_to(
    device, tokens, out, count, groups, block, unsigned, zeros
):
    inputs, tables, bias = operands(tokens, out, count, groups, block)
    if unsigned:
        inputs = inputs._replace(levels=inputs.levels.view(torch.uint8), zero=inputs.zero + 128)
    tables = tables if zeros else tables._replace(zero=None)
    inputs, tables = moved(device, inputs), moved(device, tables)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    for dtype, added in ((torch.float32, None), (half, bias.to(device))):
        wanted = blocks.outputs(reference.matmul, inputs, tables, added, dtype)
        found = blocks_triton.outputs(inputs, tables, added, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


def test_numbers_that_are_none_stay_none(device):
    inputs, tables, _ = operands(4, 16, 2, 2, 32)
    inputs.scale[1, 1], inputs.scale[2, 0] = torch.nan, torch.inf
    inputs, tables = moved(device, inputs), moved(device, tables)
    wanted = blocks.outputs(reference.matmul, inputs, tables, None, torch.float32)
    with np.errstate(all="ignore"):  # what the interpreter says of NaN
        found = blocks_triton.outputs(inputs, tables, None, torch.float32)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert blocks_triton.outputs(
        inputs._replace(levels=inputs.levels[:0]), tables, None, torch.float32
    ).shape == (0, 16)


def test_a_cpu_takes_few_tokens_at_a_time_through_all_blocks(monkeypatch):
    inputs, tables, bias = operands(70, 16, 4, 2, 32)
    whole = blocks.outputs(reference.matmul, inputs, tables, bias, torch.float16)
    rows = []

    def product(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(levels))
        return reference.matmul(levels, weight)

    monkeypatch.setattr(blocks, "_TILE", 32 * 16)
    found = blocks.outputs(product, inputs, tables, bias, torch.float16)
    assert rows == [32] * 8 + [6] * 4
    assert torch.equal(found, whole)


def test_only_what_cublas_would_multiply_in_float32_has_one_launch():
    inputs, tables, _ = operands(4, 16, 2, 2, 32)
    on_gpu = tables._replace(levels=tables.levels.to("meta"))
    assert not blocks_triton.has_kernel(on_gpu)
    by_blocks = outputs_for(cublas.matmul, tables)
    assert by_blocks.func is blocks.outputs
    assert by_blocks.args == (cublas.matmul,)
    found = outputs_for(reference.matmul, tables)(inputs, tables, None, torch.float32)
    assert torch.equal(found, blocks.outputs(reference.matmul, inputs, tables, None, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("width", "block"), [(576, 16), (1536, 32), (896, 64), (4864, 4864)])
def test_on_a_gpu_whole_linears_have_the_bits_of_the_definition(width, block):
    device = torch.device("cuda")
    inputs, tables, bias = operands(3000, 1536, width // block, width // block, block)
    inputs, tables = moved(device, inputs), moved(device, tables)
    assert outputs_for(cublas.matmul, tables) is blocks_triton.outputs
    assert outputs_for(reference.matmul, tables) is not blocks_triton.outputs
    wide = tables._replace(scale=tables.scale.double())
    assert outputs_for(cublas.matmul, wide) is not blocks_triton.outputs
    wanted = blocks.outputs(cublas.matmul, inputs, tables, bias.to(device), torch.float32)
    found = blocks_triton.outputs(inputs, tables, bias.to(device), torch.float32)
    assert torch.equal(found, wanted)
