"""Kernels that turn inputs in blocks before they quantize them, against their definition."""

import pytest
import torch

from spinlab.formats.quantizer import TokenQuantizer
from spinlab.rotation.blocks import InvertibleBlocks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.kernels.producers import blocks
from spinlab.runtime.kernels.producers import launch as gpu
from spinlab.runtime.kernels.producers.blocks import turned
from tests.runtime.kernels.test_producers import GRIDS, assert_close, in_blocks, rows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SCALE = torch.linspace(0.25, 4, 96, dtype=torch.float64)
IN_BLOCKS = {
    "blocks of 16": dict(width=96, block=16),
    "one block": dict(width=32, block=32),
    "blocks of 32, scaled": dict(width=96, block=32, scale=SCALE),
    "scaled elsewhere": dict(width=96, block=32, scale=SCALE, folded=True),
    "dual": dict(width=96, block=32, dual=True, scale=SCALE),
    "dual, shared": dict(width=96, block=16, dual=True, shared=True),
    "rounded, scaled": dict(width=96, block=32, scale=SCALE, rounded=True),
    "dual, rounded, scaled": dict(width=96, block=32, dual=True, scale=SCALE, rounded=True),
    "blocks of 128": dict(width=384, block=128),
    "blocks of 8": dict(width=32, block=8),
    "dual, blocks of 48": dict(width=96, block=48, dual=True),
    "blocks of 96": dict(width=192, block=96),
}


# of a prompt, a large GPU turns whole blocks
@pytest.mark.parametrize(("tokens", "whole"), [(1, False), (5, False), (70, False), (70, True)])
@pytest.mark.parametrize("case", IN_BLOCKS)
def test_rotations_in_blocks_are_their_definition(run, case, tokens, whole, monkeypatch):
    """Few tokens and many, of a tensor whose rows lie apart; behind norms and gates too."""
    if whole:
        monkeypatch.setattr(blocks, "_piece", lambda tokens, block, *_: (block, 2))
    rotation = in_blocks(**IN_BLOCKS[case])
    group_size = (0, 16)[len(case) % 2]
    quantizer = TokenQuantizer(GRIDS[len(case) % 4], group_size, 0.95)
    gate, up = rows(tokens, 2 * rotation.width, dtype=torch.float16).chunk(2, dim=1)
    gain = rows(rotation.width, dtype=torch.float16)
    assert gpu.has_rotation_kernel(gate, rotation, quantizer)
    assert_close(*run("rotate_quantize", up, rotation, quantizer), gate.dtype)
    assert_close(*run("gate_quantize", gate, up, rotation, quantizer), gate.dtype)
    assert_close(*run("norm_quantize", up, gain, 1e-5, quantizer, rotation), gate.dtype)
    assert_close(*run("norm_quantize", up / 256, None, 1e-5, quantizer, rotation), gate.dtype)
    (empty, _) = run("rotate_quantize", up[:0], rotation, quantizer)
    assert empty.levels.shape == (0, rotation.width)


@pytest.mark.parametrize("tokens", [1, 20])
def test_blocks_that_are_no_rotations_are_their_definition(run, tokens):
    sizes = torch.tensor([1e-2, 1.0, 30.0], dtype=torch.float64)[:, None, None]
    rotation = ScaledDual(dual=InvertibleBlocks(sizes * torch.randn(3, 32, 32).double()))
    quantizer = TokenQuantizer(GRIDS[0], 32)
    gate, up = rows(tokens, 2 * rotation.width, dtype=torch.float16).chunk(2, dim=1)
    assert gpu.has_rotation_kernel(gate, rotation, quantizer)
    assert_close(*run("rotate_quantize", up, rotation, quantizer), gate.dtype)
    assert_close(*run("gate_quantize", gate, up, rotation, quantizer), gate.dtype)


@pytest.mark.parametrize("dual", [False, True])
def test_a_rotation_in_blocks_is_as_exact_as_float32(device, dual):
    """Against float64, before what is handed on is rounded to 16 bits: no factor loses bits."""
    rotation = in_blocks(512, 64, dual=dual)
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    x = rows(20, 512, dtype=half).to(device)
    found = turned(x, rotation).double().cpu()
    wanted = x.double().cpu() @ rotation.dual.dense()
    # one rounding of the result, and what 2^-15 of the terms may add
    bound = (
        torch.finfo(half).eps / 2 * wanted.abs() + 2**-15 * x.double().cpu().norm(dim=1)[:, None]
    )
    assert ((found - wanted).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 20, 300])
@pytest.mark.parametrize("dual", [False, True])
def test_rounded_factors_are_one_matrix_of_16_bits(device, dual, tokens):
    """And the product is their definition's, but for roundings that fall otherwise."""
    rotation = in_blocks(512, 64, dual=dual, rounded=True)
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    x = rows(tokens, 512, dtype=half).to(device)
    passes = blocks._passes_of(rotation, x)
    assert all(len(each.parts) == 1 and each.parts.dtype.itemsize == 2 for each in passes)
    between = {each.gives for each in passes[:-1]}
    assert between == ({half if half == torch.bfloat16 else torch.float32} if dual else set())
    found, wanted = turned(x, rotation).double(), rotation(x).double()
    step = torch.finfo(half).eps * wanted.abs().amax(1, keepdim=True)
    assert ((found - wanted).abs() <= step).all()
    # what goes on to a second rotation falls otherwise for one number, and moves a block
    assert (found != wanted).double().mean() < (0.1 if dual else 0.02)


@pytest.mark.parametrize("case", ["blocks of 32, scaled", "dual", "blocks of 128"])
def test_a_program_takes_several_tiles_in_turn(run, monkeypatch, case):
    """The last one fewer than the others, and fewer tokens."""
    monkeypatch.setattr("spinlab.runtime.kernels.producers.blocks._tiles_a_program", lambda *_: 2)
    monkeypatch.setattr("spinlab.runtime.kernels.producers.blocks._STEP", 16)
    rotation = in_blocks(**IN_BLOCKS[case])
    x = rows(70, rotation.width, dtype=torch.float16)
    assert_close(*run("rotate_quantize", x, rotation, TokenQuantizer(GRIDS[0])), x.dtype)


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e5, 1e7])
def test_scales_far_from_1_cost_no_bits(device, scale):
    """Of one channel beside others, whose numbers are as large: their part of the result counts."""
    scales = torch.ones(64, dtype=torch.float64)
    scales[3] = scale
    rotation = in_blocks(64, 32, scale=scales)
    x = torch.zeros(5, 64, dtype=torch.float16, device=device)
    x[:, 3] = torch.linspace(1, 4, 5)
    found = turned(x, rotation).double().cpu()
    wanted = x.double().cpu() / scales @ rotation.dual.dense()
    normal = wanted.abs() > 6.2e-5  # of float16; below there are steps of 2^-24
    bound = torch.where(normal, 2.0**-10 * wanted.abs(), 2.0**-24)
    assert ((found - wanted).abs() <= bound).all()


def test_between_two_rotations_numbers_may_be_larger_than_float16_has(device):
    """A token of large equal numbers, all of which one rotation sums up and the next spreads."""
    ones = hadamard_rotation(64).right.expand(2, -1, -1)
    rotation = ScaledDual(dual=DualTransform(ones, torch.arange(128), ones))
    x = torch.full((3, 128), 9000.0, dtype=torch.float16, device=device)
    found, wanted = turned(x, rotation), rotation(x)
    assert wanted.isfinite().all()
    assert (x.double().cpu() @ rotation.dual.dense()).abs().max() < 65504
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1)
