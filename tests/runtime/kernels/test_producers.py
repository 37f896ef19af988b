"""Kernels that make quantized inputs against the quantizer."""

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.runtime.kernels.formats import into_int8
from spinlab.runtime.kernels.producers import launch as gpu
from spinlab.runtime.kernels.producers import reference as producers
from tests.runtime.kernels.conftest import sums

GRIDS = [
    IntegerFormat(4, False),
    IntegerFormat(4, True),
    IntegerFormat(8, False),
    IntegerFormat(8, True),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(*shape, dtype=torch.float32):
    """Rows of different spread and mean: some have one sign, some both."""
    x = torch.randn(shape, dtype=torch.float64)
    shift = 4 * torch.randn(*shape[:-1], 1, dtype=torch.float64)
    return ((x + shift) * torch.rand(*shape[:-1], 1, dtype=torch.float64)).to(dtype)


def floats(found, quantizer):
    """What levels stand for, in float64."""
    scale, zero = (t.double()[..., None] for t in (found.scale, found.zero))
    levels = found.levels.double().unflatten(1, (scale.shape[1], -1))
    return ((levels - zero) * scale).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [0, 6])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_stand_for_what_the_quantizer_rounds_to(grid, group_size, dtype):
    quantizer = TokenQuantizer(grid, group_size, 0.9)
    x = rows(2, 5, 24, dtype=dtype)
    found = producers.quantize(x, quantizer)
    assert found.levels.dtype == torch.int8
    assert found.levels.shape == (10, 24)
    wanted = quantizer.decode(quantizer.encode(x)).flatten(0, 1).double()
    assert torch.allclose(floats(found, quantizer), wanted, rtol=1e-6, atol=0)
    assert torch.equal(found.sums.long(), sums(found))
    shifted = found.levels.long() + into_int8(grid)
    assert grid.lowest <= shifted.min()
    assert shifted.max() <= grid.highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # slow to import

    norm = LlamaRMSNorm(40, eps=1e-5).to(dtype)
    norm.weight.data = rows(40, dtype=dtype)
    x, quantizer = rows(7, 40, dtype=dtype), TokenQuantizer(IntegerFormat(8, False))
    with torch.no_grad():
        wanted = producers.quantize(norm(x), quantizer)
    assert_equal(producers.norm_quantize(x, norm.weight.data, 1e-5, quantizer), wanted)
    ones = torch.ones(40, dtype=dtype)
    plain = producers.norm_quantize(x, None, 1e-5, quantizer)
    assert_equal(plain, producers.norm_quantize(x, ones, 1e-5, quantizer))


def test_gates_and_rotations_are_dense_products():
    rotation = hadamard_rotation(576)
    gate, up = (rows(5, 576, dtype=torch.float64) for _ in range(2))
    quantizer = TokenQuantizer(IntegerFormat(8, True), 36)
    gated = gate / (1 + (-gate).exp()) * up
    wanted = producers.quantize(gated @ rotation.dense(), quantizer)
    found = producers.gate_quantize(gate, up, rotation, quantizer)
    other = producers.rotate_quantize(gated, rotation, quantizer)
    for result in (found, other):
        assert torch.allclose(result.scale, wanted.scale)
        assert (result.levels - wanted.levels).abs().max() <= 1
        assert (result.levels != wanted.levels).double().mean() < 1e-3


def test_a_kernel_is_only_offered_what_it_can_do():
    plain, groups = TokenQuantizer(GRIDS[0]), TokenQuantizer(GRIDS[0], 48)

    def offered(rotation, quantizer=plain, dtype=torch.bfloat16):
        width = 64 if rotation is None else rotation.width
        return gpu.has_rotation_kernel(torch.empty(1, width, dtype=dtype), rotation, quantizer)

    for width in (576, 1536, 4096, 8192, 11008, 13824, 14336):
        assert offered(hadamard_rotation(width))
    rotation = hadamard_rotation(1536)
    assert offered(rotation, TokenQuantizer(GRIDS[0], 32))
    assert not offered(rotation, groups)
    assert not offered(rotation, TokenQuantizer(GRIDS[0], 64))
    assert not offered(rotation, dtype=torch.float32)
    assert not offered(hadamard_rotation(29568))
    dense, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert not offered(OnlineRotation(torch.eye(1), dense))
    assert offered(None, groups, torch.float32)
    assert not offered(None, dtype=torch.float64)
    for block in (4, 16, 96, 128):
        assert offered(in_blocks(3 * block, block))
        assert offered(in_blocks(3 * block, block, dual=True), groups)
    assert not offered(in_blocks(192, 64), dtype=torch.float32)
    assert not offered(in_blocks(512, 256))
    assert not offered(ScaledDual(torch.ones(64), folded=False))


def assert_equal(found, wanted):
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def assert_close(found, wanted, dtype, share=0.005):
    """Floats that differ by their rounding lie, now and then, on two sides of a boundary."""
    torch.testing.assert_close(found.scale, wanted.scale, rtol=4 * torch.finfo(dtype).eps, atol=0)
    off = found.levels.int() - wanted.levels.int()
    assert off.abs().max() <= 1
    assert (off != 0).sum() <= max(1, share * off.numel())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 24), torch.float32),
        ((3, 4, 40), torch.bfloat16),
        ((2, 4100), torch.float16),
        ((2, 1030), torch.bfloat16),
        ((0, 24), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantizing_is_exact(run, grid, shape, dtype):
    for group_size in (0, shape[-1] // 2):
        assert_equal(
            *run("quantize", rows(*shape, dtype=dtype), TokenQuantizer(grid, group_size, 0.9))
        )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ties_are_decided_as_defined(run, grid):
    """Half-way between levels, at both ends of a token, and where float noise is all there is."""
    ties = torch.arange(4 * grid.lowest, 4 * grid.highest + 1) / 4 - (0 if grid.symmetric else 7.5)
    massive = ties.sign() * (1 + 1e-5 * torch.randn(20, len(ties)))
    x = torch.cat((ties[None], ties[None] - 0.25, massive))
    for ratio in (1.0, 0.9):
        assert_equal(*run("quantize", x, TokenQuantizer(grid, 0, ratio)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_around_every_half_both_sides_take_the_same_level(run, grid):
    start = grid.lowest + 1 if grid.symmetric else -(grid.highest // 2)
    halves = torch.arange(start, start + grid.highest - grid.lowest - grid.symmetric) + 0.5
    x = halves * (1 + torch.tensor([[0], [-1e-6], [1e-6], [-1e-7], [1e-7]]))
    ends = torch.tensor([halves[0] - 0.5, halves[-1] + 0.5]).expand(len(x), 2)
    for found in run("quantize", torch.cat((x, ends), 1), TokenQuantizer(grid)):
        levels = found.levels[:, :-2].int() - found.zero  # both less a shift
        assert torch.equal(levels.float().cpu(), halves.round().expand_as(x))


def test_quantizing_takes_any_strides(run):
    quantizer = TokenQuantizer(GRIDS[0], 4)
    assert_equal(*run("quantize", rows(24, 5).mT, quantizer))
    assert_equal(*run("quantize", rows(6, 3, 16)[::2, 1:, ::2], quantizer))


# the interpreter cuts bfloat16 off instead of rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "group_size"), [(24, 0), (72, 12)])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]], ids=str)
def test_norms_and_gates_are_their_definition(run, grid, width, group_size, dtype):
    quantizer = TokenQuantizer(grid, group_size, 0.95)
    x, gain = rows(5, width, dtype=dtype), rows(width, dtype=dtype)
    assert_close(*run("norm_quantize", x, gain, 1e-5, quantizer), dtype)
    assert_close(*run("norm_quantize", x / 256, None, 1e-5, quantizer), dtype)  # epsilon counts
    gate, up = rows(5, 2 * width, dtype=dtype).chunk(2, dim=1)
    assert_close(*run("gate_quantize", gate, up, None, quantizer), dtype)


def in_blocks(width, block, dual=False, shared=False, scale=None, folded=False, rounded=False):
    """Return a transform in random blocks, with a permutation and others behind it if dual."""

    def drawn():
        count = 1 if shared else width // block
        return torch.linalg.qr(torch.randn(count, block, block, dtype=torch.float64))[0]

    turn = BlockRotation(drawn())
    if dual:
        turn = DualTransform(turn.first, torch.randperm(width), drawn())
    return ScaledDual(scale, folded, turn, rounded)


def blocks(left, right, many):
    return OnlineRotation(hadamard_rotation(left).right, hadamard_rotation(right).right, many)


ROTATIONS = {
    "36x16": (hadamard_rotation(576), 0),
    "48x32": (hadamard_rotation(1536), 0),
    "48x32 in groups": (hadamard_rotation(1536), 32),
    "76x32 in two pieces": (hadamard_rotation(2432), 0),
    "76x32 in pieces and groups": (hadamard_rotation(2432), 32),
    "blocks of 32": (hadamard_rotation(512, 32), 0),
    "blocks of 36": (hadamard_rotation(576, 36), 0),
    "blocks of 12": (hadamard_rotation(96, 12), 0),
    "blocks of 4x16": (blocks(4, 16, 3), 0),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_rotations_are_their_definition(run, case):
    rotation, group_size = ROTATIONS[case]
    quantizer = TokenQuantizer(GRIDS[len(case) % 2], group_size, 0.95)
    gate, up = rows(5, 2 * rotation.width, dtype=torch.float16).chunk(2, dim=1)
    assert gpu.has_rotation_kernel(gate, rotation, quantizer)
    assert_close(*run("gate_quantize", gate, up, rotation, quantizer), gate.dtype)
    assert_close(*run("rotate_quantize", up, rotation, quantizer), gate.dtype)
