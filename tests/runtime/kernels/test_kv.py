"""Keys and values are rotated and coded by kernels as by their definition."""

import pytest
import torch
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from spinlab.config import CodecConfig
from spinlab.config.kv import LloydMaxConfig
from spinlab.formats import IntegerFormat
from spinlab.formats.pack import unpack_nibbles
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.codecs.lloyd_max import LloydMaxCodec
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.runtime.kernels.kv import launch as gpu
from spinlab.runtime.kernels.kv import reference
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize, empty_rows

ASYMMETRIC, SYMMETRIC, THREE = (
    IntegerFormat(4, False),
    IntegerFormat(4, True),
    IntegerFormat(3, True),
)
# Triton's interpreter cuts bfloat16 off where a GPU rounds
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()
ONE = torch.ones(1, 1, dtype=torch.float64)


def drawn(shape, dtype, device, rotary, seed=0):
    """Queries, keys and values as slices of one product, with angles for all tokens."""
    batch, tokens, heads, kv_heads, width = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [n * width for n in (heads, kv_heads, kv_heads)]
    product = torch.randn(batch, tokens, sum(sizes), generator=g)
    product *= 4 * torch.rand(batch, tokens, 1, generator=g)
    parts = product.to(device, dtype).split(sizes, dim=2)
    angles = 7 * torch.rand(1 if seed % 2 else batch, tokens, rotary // 2, generator=g)
    angles = torch.cat((angles, angles), dim=2).to(device)
    qkv = [x.unflatten(2, (-1, width)) for x in parts]
    return *qkv, angles.cos().to(dtype), angles.sin().to(dtype)


def poisoned(shape, grid, capacity, clip, device) -> PackedRows:
    batch, _, _, kv_heads, width = shape
    layout = AffineCodec(grid, width, width, clip).packed
    rows = empty_rows(batch, kv_heads, capacity, layout, device)
    for part in (rows.packed, rows.scale, rows.zero):
        if part is not None:
            part.fill_(123)
    return rows


def codec_of(rows: PackedRows) -> AffineCodec:
    return AffineCodec(rows.layout.grid, rows.layout.width, 0, rows.layout.clip_ratio)


def of_levels(width, bits, length="norm", turn="none", residual=False) -> LloydMaxCodec:
    own = LloydMaxConfig(turn, length, residual)
    settings = CodecConfig(codec="lloyd_max", bits=bits, lloyd_max=own)
    return LloydMaxCodec.make("kv.keys", settings, width, torch.Generator().manual_seed(0))


def random_r3(width):
    return OnlineRotation(ONE, random_orthogonal(width, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC, THREE], ids=str)
def test_rows_hold_what_stock_rope_r3_and_the_codec_give(grid, dtype):
    shape, r3 = (2, 5, 4, 2, 48), hadamard_rotation(48)
    q, k, v, cos, sin = drawn(shape, dtype, "cpu", 32)
    keys, values = (poisoned(shape, grid, 9, clip, "cpu") for clip in (1.0, 0.9))
    queries, k_round, v_round = reference.store(
        q, k, v, cos, sin, r3, keys, values, torch.tensor([3]), True
    )
    stock = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.equal(queries, r3(stock[0]))
    assert torch.equal(k_round, codec_of(keys).round(r3(stock[1])))
    assert torch.equal(v_round, codec_of(values).round(v.transpose(1, 2)))
    for rows, rounded in ((keys, k_round), (values, v_round)):
        assert torch.equal(dequantize(rows, 8, dtype)[:, :, 3:], rounded)
        assert (rows.packed[:, :, [0, 1, 2, 8]] == 123).all()
        assert (rows.scale[:, :, [0, 1, 2, 8]] == 123).all()


def test_bytes_count_levels_scales_and_zero_points():
    codecs = [AffineCodec(grid, 64) for grid in (ASYMMETRIC, SYMMETRIC)]
    for codec in codecs:
        rows = empty_rows(2, 3, 10, codec.packed, "cpu")
        assert rows.bytes == 2 * 3 * 10 * codec.row_bytes == 2 * 3 * 10 * codec.packed.row_bytes
        assert (rows.capacity, rows.head_dim) == (10, 64)
        assert not dequantize(rows, 10, torch.float32).any()


@pytest.mark.parametrize(
    "codec",
    [
        AffineCodec(IntegerFormat(8, False), 64),
        AffineCodec(ASYMMETRIC, 64, 32),
        AffineCodec(SYMMETRIC, 6),
        of_levels(64, 5),
        of_levels(64, 4, turn="hadamard"),
        of_levels(64, 4, residual=True),
        of_levels(30, 4),
    ],
    ids=range(7),
)
def test_codecs_that_do_not_fit_have_no_packed_rows(codec):
    assert codec.packed is None


@pytest.mark.parametrize("bits", [2, 3])
def test_packed_rows_hold_nibbles_and_count_them(bits):
    codec = AffineCodec(IntegerFormat(bits, False), 64)
    rows = empty_rows(1, 1, 4, codec.packed, "cpu")
    assert codec.bits == bits + 24 / 64
    assert rows.bytes * 8 / (4 * 64) == codec.packed.bits == 4 + 24 / 64


CASES = {
    "llama": ((2, 3, 4, 2, 64), 64, hadamard_rotation(64), (ASYMMETRIC, ASYMMETRIC)),
    "phi": ((1, 5, 3, 3, 96), 72, hadamard_rotation(96), (SYMMETRIC, THREE)),
    "no_power_of_two": ((3, 2, 2, 1, 80), 80, hadamard_rotation(80), (ASYMMETRIC, SYMMETRIC)),
    "plain": ((1, 1, 3, 1, 32), 32, None, (SYMMETRIC, ASYMMETRIC)),
    "no_rope": ((2, 3, 2, 1, 32), 0, hadamard_rotation(32), (ASYMMETRIC, SYMMETRIC)),
    "dense": ((2, 1, 2, 2, 32), 16, random_r3(32), (ASYMMETRIC, ASYMMETRIC)),
    "blocks": ((1, 2, 2, 1, 64), 64, hadamard_rotation(64, block=16), (ASYMMETRIC, SYMMETRIC)),
    "many_tokens": ((1, 65, 2, 1, 32), 32, hadamard_rotation(32), (ASYMMETRIC, ASYMMETRIC)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_writes_what_the_definition_does(name, dtype, device):
    shape, rotary, r3, grids = CASES[name]
    tokens, position = shape[1], torch.tensor([4], device=device)
    inputs = drawn(shape, dtype, device, rotary, seed=list(CASES).index(name))
    results, caches = [], []
    for store in (gpu.store, reference.store):
        caches.append([poisoned(shape, g, tokens + 7, 0.93, device) for g in grids])
        results.append(store(*inputs, r3, *caches[-1], position, True))
    # sums in another order; in 16 bits that shows where a number lies between two
    units = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    most = results[1][0].abs().max()
    assert (results[0][0] - results[1][0]).abs().max() <= units * most
    for found, wanted in zip(*caches, strict=True):
        levels = [unpack_nibbles(rows.packed, signed=False).int() for rows in (found, wanted)]
        assert (levels[0] == levels[1]).float().mean() > 0.999
        assert (levels[0] - levels[1]).abs().max() <= 1
        assert torch.allclose(found.scale, wanted.scale, rtol=1e-3)
        if found.zero is not None:
            assert (found.zero.int() - wanted.zero.int()).abs().max() <= 1
    for rows, rounded in zip(caches[0], results[0][1:], strict=True):
        assert torch.equal(dequantize(rows, tokens + 4, dtype)[:, :, 4:], rounded)


@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC, THREE], ids=str)
def test_ties_are_decided_as_defined(grid, device):
    """A token of one massive channel, which R3 spreads evenly, and levels and a half."""
    shape = (1, 2, 1, 1, 32)
    q, k, v, cos, sin = drawn(shape, torch.float32, device, 32)
    k.zero_()[..., 5] = 1000.0
    v.copy_(torch.arange(-16, 16, device=device) / 2)
    v[:, 1] += 0.5
    caches = [[poisoned(shape, grid, 4, 1.0, device) for _ in range(2)] for _ in range(2)]
    for store, rows in zip((gpu.store, reference.store), caches, strict=True):
        position = torch.tensor([0], device=device)
        store(q, k, v, cos, sin, hadamard_rotation(32), *rows, position, False)
    for found, wanted in zip(*caches, strict=True):
        assert torch.equal(found.packed, wanted.packed)
        assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_around_every_half_both_sides_take_the_same_level(grid, device):
    """Tokens of one head whose values lie about halves of a range with scale 1."""
    noise = torch.tensor([0, -1e-6, 1e-6, -1e-7, 1e-7])[:, None]
    halves = torch.arange(-7, 7) + 0.5
    x = torch.cat(
        [halves * (1 + noise), torch.tensor([-7.0, 7 if grid.symmetric else 8]).expand(5, 2)], 1
    )
    shape = (1, 5, 1, 1, 16)
    inputs = drawn(shape, torch.float32, device, 16)
    inputs[2].copy_(x[None, :, None])
    for store in (gpu.store, reference.store):
        rows = [poisoned(shape, grid, 5, 1.0, device) for _ in range(2)]
        store(*inputs, None, *rows, torch.tensor([0], device=device), False)
        found = dequantize(rows[1], 5, torch.float32)[0, 0, :, :-2]
        assert torch.equal(found.cpu(), halves.round().expand(5, -1))


def test_without_a_round_trip_only_queries_come_back(device):
    shape = (2, 1, 2, 1, 32)
    inputs = drawn(shape, torch.float32, device, 32)
    rows = [poisoned(shape, ASYMMETRIC, 3, 1.0, device) for _ in range(2)]
    position = torch.tensor([2], device=device)
    queries, *none = gpu.store(*inputs, None, *rows, position, False)
    assert queries.shape == (2, 2, 1, 32) and none == [None, None]
    assert torch.equal(
        dequantize(rows[1], 3, torch.float32)[:, :, 2:],
        codec_of(rows[1]).round(inputs[2].transpose(1, 2)),
    )


def test_tokens_beyond_the_capacity_are_not_written(device):
    shape = (1, 3, 1, 2, 32)
    inputs = drawn(shape, torch.float32, device, 32)
    rows = [poisoned(shape, SYMMETRIC, 4, 1.0, device) for _ in range(2)]
    gpu.store(*inputs, None, *rows, torch.tensor([2], device=device), False)
    wanted = codec_of(rows[1]).round(inputs[2].transpose(1, 2))[:, :, :2]
    assert torch.equal(dequantize(rows[1], 4, torch.float32)[:, :, 2:], wanted)
    assert (rows[0].packed[:, :, :2] == 123).all()


LEVELS = {
    "norm": ((2, 3, 4, 2, 64), 64, hadamard_rotation(64), (4, 3), ("norm", "plain")),
    "fits": ((1, 5, 3, 3, 96), 72, hadamard_rotation(96), (2, 4), ("least_squares", "eden")),
    "few": ((1, 2, 2, 1, 40), 40, None, (1, 2), ("eden", "norm")),
    "many_tokens": ((1, 65, 2, 1, 32), 32, hadamard_rotation(32), (4, 4), ("plain", "norm")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_written_as_the_codec_does(name, dtype, device):
    """By kernel and definition, and read back: a head of zeros, and one of a single number, too."""
    shape, rotary, r3, bits, lengths = LEVELS[name]
    batch, tokens, _, kv_heads, width = shape
    codecs = [of_levels(width, b, length) for b, length in zip(bits, lengths, strict=True)]
    q, k, v, cos, sin = drawn(shape, dtype, device, rotary, seed=3)
    v[0, 0, 0] = 0
    v[-1, -1, 0] = 0
    v[-1, -1, 0, 5] = -3
    position, caches, results = torch.tensor([1], device=device), [], []
    for store in (gpu.store, reference.store):
        rows = [empty_rows(batch, kv_heads, tokens + 2, c.packed, device) for c in codecs]
        caches.append(rows)
        results.append(store(q, k, v, cos, sin, r3, *rows, position, True))
    for found, wanted in zip(*caches, strict=True):
        nibbles = [unpack_nibbles(rows.packed, signed=False).int() for rows in (found, wanted)]
        assert (nibbles[0] == nibbles[1]).float().mean() > 0.998
        assert (nibbles[0] - nibbles[1]).abs().max() <= 1
        torch.testing.assert_close(found.scale, wanted.scale, rtol=2e-3, atol=0)
    for rows, rounded in zip(caches[0], results[0][1:], strict=True):
        assert torch.equal(dequantize(rows, tokens + 1, dtype)[:, :, 1:], rounded)
    values = codecs[1].round(v.transpose(1, 2))
    assert torch.equal(results[1][2], values)
    torch.testing.assert_close(results[0][2].double(), values.double(), rtol=4e-3, atol=0.02)


def test_packed_levels_count_their_bytes():
    codec = of_levels(64, 3)
    rows = empty_rows(2, 3, 10, codec.packed, "cpu")
    assert codec.bits == 3 + 16 / 64
    assert rows.bytes == 2 * 3 * 10 * codec.packed.row_bytes == 2 * 3 * 10 * 34
    assert codec.packed.bits == 4 + 16 / 64
