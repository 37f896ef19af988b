"""Kernels that make quantized inputs against the quantizer."""

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.rotation.blocks import BlockRotation, InvertibleBlocks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.runtime.kernels.formats import into_int8
from spinlab.runtime.kernels.producers import launch as gpu
from spinlab.runtime.kernels.producers import reference as producers
from spinlab.runtime.kernels.producers.blocks import turned

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


@pytest.fixture
def run(device, monkeypatch):
    """Run an operation and its definition; whatever the kernel leaves unwritten is poison."""

    def poisoned(*shape, **options):
        return torch.full(shape, 77, **options)

    def both(name, *arguments):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", poisoned)
            found = getattr(gpu, name)(*arguments)
        wanted = getattr(producers, name)(*arguments)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(found.sums.long(), sums(found))
        return found, wanted

    return both


def sums(found):
    return found.levels.long().unflatten(1, (found.scale.shape[1], -1)).sum(2)


def assert_equal(found, wanted):
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def assert_close(found, wanted, dtype, share=0.005):
    """Floats that differ by their rounding lie, now and then, on two sides of a boundary."""
    torch.testing.assert_close(found.scale, wanted.scale, rtol=4 * torch.finfo(dtype).eps, atol=0)
    off = found.levels.int() - wanted.levels.int()
    assert off.abs().max() <= 1
    assert (off != 0).double().mean() <= share


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


def in_blocks(width, block, dual=False, shared=False, scale=None, folded=False):
    """Return a transform in random blocks, with a permutation and others behind it if dual."""

    def drawn():
        count = 1 if shared else width // block
        return torch.linalg.qr(torch.randn(count, block, block, dtype=torch.float64))[0]

    turn = BlockRotation(drawn())
    if dual:
        turn = DualTransform(turn.first, torch.randperm(width), drawn())
    return ScaledDual(scale, folded, turn)


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


SCALE = torch.linspace(0.25, 4, 96, dtype=torch.float64)
IN_BLOCKS = {
    "blocks of 16": dict(width=96, block=16),
    "one block": dict(width=32, block=32),
    "blocks of 32, scaled": dict(width=96, block=32, scale=SCALE),
    "scaled elsewhere": dict(width=96, block=32, scale=SCALE, folded=True),
    "dual": dict(width=96, block=32, dual=True, scale=SCALE),
    "dual, shared": dict(width=96, block=16, dual=True, shared=True),
    "blocks of 128": dict(width=384, block=128),
    "blocks of 8": dict(width=32, block=8),
    "dual, blocks of 48": dict(width=96, block=48, dual=True),
}


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("case", IN_BLOCKS)
def test_rotations_in_blocks_are_their_definition(run, case, tokens):
    """Few tokens and many, of a tensor whose rows lie apart; behind norms and gates too."""
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


@pytest.mark.parametrize("case", ["blocks of 32, scaled", "dual", "blocks of 128"])
def test_a_program_takes_several_blocks_in_turn(run, monkeypatch, case):
    monkeypatch.setattr("spinlab.runtime.kernels.producers.blocks._blocks_a_program", lambda *_: 3)
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
