"""Attention over packed rows against exact arithmetic."""

import math

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.kv.base import OwnTensor
from spinlab.kv.bias import KeyBias
from spinlab.kv.codecs.lloyd_max import lloyd_max_levels
from spinlab.kv.layouts import GridLayout, LevelsLayout
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.runtime.kernels.attention import launch as gpu
from spinlab.runtime.kernels.attention import reference
from spinlab.runtime.kernels.attention.launch import Plan
from spinlab.runtime.kernels.kv.rows import PackedRows, empty_rows
from spinlab.runtime.kernels.launch import GPU, planning

# Triton's interpreter cuts bfloat16 off where a GPU rounds
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()


def random_r3(width) -> OnlineRotation:
    one = torch.ones(1, 1, dtype=torch.float64)
    return OnlineRotation(one, random_orthogonal(width, torch.Generator().manual_seed(0)))


def random_rows(batch, heads, capacity, grid, width, device, seed) -> PackedRows:
    """Rows on a grid, or of levels where that is a number of bits."""
    g = torch.Generator().manual_seed(seed)
    layout = GridLayout(grid, width) if isinstance(grid, IntegerFormat) else levels_of(width, grid)
    rows = empty_rows(batch, heads, capacity, layout, "cpu")
    rows.packed.random_(0, 256, generator=g)
    if isinstance(layout, LevelsLayout):
        rows.packed.bitwise_and_(17 * (len(layout.levels.first) - 1))  # both nibbles
    rows.scale.uniform_(0.01, 0.3, generator=g)
    if rows.zero is not None:
        rows.zero.random_(3, 13, generator=g)
    zero = None if rows.zero is None else rows.zero.to(device)
    return PackedRows(rows.packed.to(device), rows.scale.to(device), zero, rows.layout)


def levels_of(width, bits) -> LevelsLayout:
    levels = torch.from_numpy(lloyd_max_levels(width, bits).astype("float16"))
    return LevelsLayout(width, OwnTensor(levels), "norm")


def poison(rows: PackedRows, start, length) -> None:
    """Make everything outside of start..length-1 such that its use would show."""
    many = len(rows.layout.levels.first) if isinstance(rows.layout, LevelsLayout) else 16
    for sequence, first in enumerate(start.tolist()):
        for outside in (slice(0, first), slice(length, None)):
            rows.scale[sequence, :, outside] = torch.nan
            rows.packed[sequence, :, outside] = 17 * (many - 1)


def brute_force(query, keys, values, start, length, scaling, known=None):
    """One sequence and head at a time, in float64, from levels read one by one.

    known: what is added to keys, (batch or 1, kv_heads, slots, head_dim).
    """
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.packed.shape[1]
    half = query.shape[3] // 2

    def numbers(rows, b, h, n):
        byte = rows.packed[b, h, n].cpu().long()
        levels = torch.cat((byte % 16, byte // 16)).double()
        if isinstance(rows.layout, LevelsLayout):
            return rows.layout.levels.first.double()[levels.long()] * float(rows.scale[b, h, n])
        zero = 8 if rows.zero is None else float(rows.zero[b, h, n])
        assert len(levels) == 2 * half
        return (levels - zero) * float(rows.scale[b, h, n])

    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            slots = range(int(start[b]), length)
            k = torch.stack([numbers(keys, b, h // group, n) for n in slots])
            v = torch.stack([numbers(values, b, h // group, n) for n in slots])
            if known is not None:
                k += known[b % len(known), h // group, int(start[b]) : length]
            weights = (k @ query[b, h, 0].double().cpu() * scaling).softmax(0)
            out[b, h, 0] = weights @ v
    return out


# (batch, heads, kv_heads, head_dim), capacity, length, start, plan
CASES = {
    "grouped": ((2, 4, 1, 64), 96, 77, [0, 13], Plan(16, 3, 1, 1)),
    "ungrouped": ((1, 3, 3, 32), 64, 33, [2], Plan(16, 1, 1, 1)),
    "three_to_one": ((2, 6, 2, 80), 40, 40, [39, 0], Plan(16, 2, 1, 1)),
    "wide_group": ((1, 9, 1, 96), 45, 31, [5], Plan(32, 2, 1, 1)),
    "two_parts": ((1, 17, 1, 32), 32, 20, [0], Plan(16, 1, 1, 1)),
    "llama": ((1, 2, 1, 128), 128, 100, [0], Plan(64, 2, 2, 3)),
    "one_slot": ((2, 2, 1, 32), 64, 1, [0, 0], Plan(16, 4, 1, 1)),
}


SIDES = [("grid", "grid"), ("levels", "levels"), ("levels", "grid"), ("grid", "levels")]
# every two of case, sides and dtype meet
ATTENDED = [
    pytest.param(name, sides, dtype, id=f"{name}-{'-'.join(sides)}-{dtype}")
    for i, name in enumerate(CASES)
    for j, sides in enumerate(SIDES)
    for dtype in [DTYPES[(i + j) % len(DTYPES)]]
]


@pytest.mark.parametrize(("name", "sides", "dtype"), ATTENDED)
def test_the_kernel_attends_as_exact_arithmetic_does(name, sides, dtype, device):
    (batch, heads, kv_heads, width), capacity, length, start, plan = CASES[name]
    seed = list(CASES).index(name)
    on_grids = [IntegerFormat(4, bool(seed & bit)) for bit in (1, 2)]
    bits = 1 + seed % 4
    grids = [
        bits if coded == "levels" else grid for coded, grid in zip(sides, on_grids, strict=True)
    ]
    rows = [
        random_rows(batch, kv_heads, capacity, grid, width, device, seed + i)
        for i, grid in enumerate(grids)
    ]
    start = torch.tensor(start, dtype=torch.int32, device=device)
    for part in rows:
        poison(part, start, length)
    g = torch.Generator().manual_seed(seed)
    # heads that are not contiguous with each other, some of them large
    query = torch.randn(batch, heads, 1, 2 * width, generator=g)[..., :width]
    query = (query * torch.tensor([0.01, 1.0, 30.0])[torch.arange(heads) % 3, None, None]).to(
        device, dtype
    )
    scaling = 1 / math.sqrt(width)
    tensor = torch.tensor([length], device=device)
    exact = brute_force(query, *rows, start, length, scaling)
    wanted = reference.attend(query, *rows, start, tensor, scaling)
    found = gpu.attend(query, *rows, start, tensor, scaling, plan=plan)
    assert found.shape == query.shape and found.dtype == dtype
    errors = [(x.cpu().double() - exact).abs().max().item() for x in (found, wanted)]
    # weights and queries pass through float16
    noise = 2e-6 if dtype == torch.float32 else 2.0**-11
    assert errors[0] <= 2 * errors[1] + noise * exact.abs().max()


# of a case's heads: rotary_dim, whether sequences share positions, R3
BIASED = {
    "grouped": (64, False, hadamard_rotation(64)),
    "ungrouped": (16, True, None),
    "three_to_one": (80, False, hadamard_rotation(80)),
    "wide_group": (72, True, hadamard_rotation(96)),
    "two_parts": (32, True, random_r3(32)),
    "llama": (128, True, hadamard_rotation(128)),
    "one_slot": (32, False, None),
}


def waves_of(rotary, capacity, batch, seed) -> torch.Tensor:
    """Cosines and sines of RoPE at any positions: (batch, capacity, rotary), float32."""
    g = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 4000, (batch, capacity, 1), generator=g)
    angle = positions * 1e4 ** (-torch.arange(rotary // 2) / (rotary // 2))
    return torch.cat((angle.cos(), angle.sin()), -1)


def known_to(bias, waves) -> torch.Tensor:
    """What a bias adds to keys, in float64: (batch or 1, kv_heads, slots, head_dim)."""
    kv_heads, width = bias.bias.shape
    shape = (len(waves), kv_heads, waves.shape[1], width)
    return bias.added(torch.zeros(shape, dtype=torch.float64), waves.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BIASED)
def test_the_kernel_adds_a_long_bias_of_keys_to_their_scores(name, dtype, device):
    """Oracle: rows and bias summed to keys in float64; positions are of any order."""
    (batch, heads, kv_heads, width), capacity, length, start, plan = CASES[name]
    rotary, shared, r3 = BIASED[name]
    seed = list(CASES).index(name)
    rows = [
        random_rows(batch, kv_heads, capacity, IntegerFormat(4, bool(i)), width, device, seed + i)
        for i in range(2)
    ]
    start = torch.tensor(start, dtype=torch.int32, device=device)
    for part in rows:
        poison(part, start, length)
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, 1, width, generator=g).to(device, dtype)
    drawn = torch.randn(kv_heads, width, generator=g)
    bias = KeyBias(600 * drawn / drawn.norm(dim=1, keepdim=True), True, r3)
    waves = waves_of(rotary, capacity, 1 if shared else batch, seed)
    known = known_to(bias, waves)
    scaling, tensor = 1 / math.sqrt(width), torch.tensor([length], device=device)
    exact = brute_force(query, *rows, start, length, scaling, known)
    scores = bias.scores(query, waves.to(device))
    wanted = reference.attend(query, *rows, start, tensor, scaling, scores)
    found = gpu.attend(query, *rows, start, tensor, scaling, scores, plan=plan)
    # what does not turn is left out of scores, and softmax of the oracle does not see it
    errors = [(x.cpu().double() - exact).abs().max().item() for x in (found, wanted)]
    noise = 2e-6 if dtype == torch.float32 else 2.0**-11
    assert errors[0] <= 2 * errors[1] + noise * exact.abs().max()
    assert errors[1] <= (1e-3 if dtype == torch.float32 else 1e-2) * exact.abs().max()
    without = reference.attend(query, *rows, start, tensor, scaling)
    assert length == 1 or (without.cpu().double() - exact).abs().max() > 0.1 * exact.abs().max()


def test_a_bias_of_keys_without_rope_adds_nothing_to_scores(device):
    """It adds the same to all scores of a query."""
    rows = [random_rows(1, 2, 12, IntegerFormat(4, False), 32, "cpu", i) for i in range(2)]
    query = torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(5)).double()
    drawn = torch.randn(2, 32, generator=torch.Generator().manual_seed(6)).double()
    bias, waves = KeyBias(drawn, False, hadamard_rotation(32)), waves_of(32, 12, 1, 0)
    assert bias.scores(query, waves) is None
    start, length = torch.zeros(1, dtype=torch.int32), torch.tensor([12])
    known = known_to(bias, waves)
    exact = brute_force(query, *rows, start, 12, 0.2, known)
    assert torch.allclose(reference.attend(query, *rows, start, length, 0.2), exact, rtol=1e-9)


def test_the_definition_is_exact_in_float64(device):
    rows = [random_rows(2, 2, 12, IntegerFormat(4, False), 32, "cpu", i) for i in range(2)]
    start = torch.tensor([3, 0], dtype=torch.int32)
    for part in rows:
        poison(part, start, 9)
    query = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(5)).double()
    found = reference.attend(query, *rows, start, torch.tensor([9]), 0.2)
    assert torch.allclose(found, brute_force(query, *rows, start, 9, 0.2), rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-4, 60.0])
def test_values_of_any_size_keep_their_precision(factor, device):
    """Float16 holds weights times scales: neither may leave its range."""
    rows = [random_rows(1, 1, 48, IntegerFormat(4, False), 32, device, i) for i in range(2)]
    rows[1].scale.mul_(factor).clamp_(min=2.0**-14)
    query = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(3)).to(device).half()
    start = torch.zeros(1, dtype=torch.int32, device=device)
    length = torch.tensor([48], device=device)
    exact = reference.attend(query.double(), *rows, start, length, 0.05)
    found = gpu.attend(query, *rows, start, length, 0.05, plan=Plan(16, 2, 1, 1))
    assert (found.double() - exact).abs().max() <= 2.0**-9 * exact.abs().max() + 2.0**-24


def test_a_sequence_without_slots_gives_zeros(device):
    rows = [random_rows(2, 1, 32, IntegerFormat(4, True), 32, device, i) for i in range(2)]
    query = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0)).to(device)
    start = torch.tensor([0, 8], dtype=torch.int32, device=device)
    length = torch.tensor([8], device=device)
    for attend in (reference.attend, lambda *a: gpu.attend(*a, plan=Plan(16, 2, 1, 1))):
        found = attend(query, *rows, start, length, 1.0)
        assert not found[1].any() and found[0].isfinite().all()


def test_plans_fill_the_device_and_split_no_short_context():
    cpu, small = torch.device("cpu"), GPU((9, 0), 1, shared=0, shared_by_all=0)
    with planning(small):
        assert gpu.plan_of(1, 8192, cpu).splits == 8
        assert gpu.plan_of(1, 100, cpu).splits == 1
        assert gpu.plan_of(64, 8192, cpu).splits == 1


def test_slots_that_were_never_written_count_as_zeros(device):
    rows = [empty_rows(1, 1, 32, GridLayout(IntegerFormat(4, False), 32), device) for _ in range(2)]
    query = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0)).to(device)
    start, length = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([20])
    found = gpu.attend(query, *rows, start, length.to(device), 1.0, plan=Plan(16, 1, 1, 1))
    assert not found.any()
