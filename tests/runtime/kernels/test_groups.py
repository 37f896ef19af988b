"""All blocks of a linear in one launch against their definition, number for number."""

import numpy as np
import pytest
import torch

from spinlab.formats.quantizer import Encoded
from spinlab.runtime.kernels.matmul import cublas, launch, outputs_for, reference
from spinlab.runtime.kernels.matmul import groups as definition
from spinlab.runtime.kernels.matmul.groups import Tables


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
        wanted = definition.outputs(reference.matmul, inputs, tables, added, dtype)
        found = launch.outputs(inputs, tables, added, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


def test_numbers_that_are_none_stay_none(device):
    inputs, tables, _ = operands(4, 16, 2, 2, 32)
    inputs.scale[1, 1], inputs.scale[2, 0] = torch.nan, torch.inf
    inputs, tables = moved(device, inputs), moved(device, tables)
    wanted = definition.outputs(reference.matmul, inputs, tables, None, torch.float32)
    with np.errstate(all="ignore"):  # what the interpreter says of NaN
        found = launch.outputs(inputs, tables, None, torch.float32)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert launch.outputs(
        inputs._replace(levels=inputs.levels[:0]), tables, None, torch.float32
    ).shape == (0, 16)


def test_a_cpu_takes_few_tokens_at_a_time_through_all_blocks(monkeypatch):
    inputs, tables, bias = operands(70, 16, 4, 2, 32)
    whole = definition.outputs(reference.matmul, inputs, tables, bias, torch.float16)
    rows = []

    def product(levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(levels))
        return reference.matmul(levels, weight)

    monkeypatch.setattr(definition, "_TILE", 32 * 16)
    found = definition.outputs(product, inputs, tables, bias, torch.float16)
    assert rows == [32] * 8 + [6] * 4
    assert torch.equal(found, whole)


class _OnGPU(torch.Tensor):
    """Levels that say they are there."""

    is_cuda, device = True, torch.device("cuda", 0)


@pytest.mark.parametrize("lacking", [None, "NVIDIA's CUDA"])
def test_only_what_cublas_would_multiply_in_float32_has_one_launch(monkeypatch, lacking):
    monkeypatch.setattr(launch, "lacks_kernels", lambda device: lacking)
    launch._runs_kernels.cache_clear()
    _, tables, _ = operands(4, 16, 2, 2, 32)
    there = tables._replace(levels=tables.levels.as_subclass(_OnGPU))
    single = Tables(there.levels, *(t[:1] for t in there[1:]))
    wide = there._replace(scale=there.scale.double())
    assert (outputs_for(cublas.matmul, there) is launch.outputs) == (lacking is None)
    for matmul, of in (
        (cublas.matmul, tables),
        (cublas.matmul, single),
        (cublas.matmul, wide),
        (reference.matmul, there),
    ):
        found = outputs_for(matmul, of)
        assert (found.func, found.args) == (definition.outputs, (matmul,))
    launch._runs_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("width", "block"), [(576, 16), (1536, 32), (896, 64), (4864, 1216)])
def test_on_a_gpu_whole_linears_have_the_numbers_of_the_definition(width, block):
    device = torch.device("cuda")
    inputs, tables, bias = operands(3000, 1536, width // block, width // block, block)
    inputs, tables = moved(device, inputs), moved(device, tables)
    assert outputs_for(cublas.matmul, tables) is launch.outputs
    assert outputs_for(reference.matmul, tables) is not launch.outputs
    wide = tables._replace(scale=tables.scale.double())
    assert outputs_for(cublas.matmul, wide) is not launch.outputs
    wanted = definition.outputs(cublas.matmul, inputs, tables, bias.to(device), torch.float32)
    found = launch.outputs(inputs, tables, bias.to(device), torch.float32)
    assert torch.equal(found, wanted)
