"""Tokens in floats beside packed rows: which they are, and attention to both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from spinlab.formats import IntegerFormat
from spinlab.kv.bias import KeyBias
from spinlab.kv.history import History
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.kernels.attention import launch as gpu
from spinlab.runtime.kernels.attention import reference
from spinlab.runtime.kernels.attention.launch import Plan
from spinlab.runtime.kernels.kv import launch as gpu_store
from spinlab.runtime.kernels.kv import reference as reference_store
from spinlab.runtime.kernels.kv.floats import FloatTokens, empty_tokens
from spinlab.runtime.kernels.kv.rows import PackedRows, dequantize, empty_rows
from tests.runtime.kernels.test_attention import DTYPES, known_to, poison, random_rows, waves_of
from tests.runtime.kernels.test_kv import ASYMMETRIC, THREE, drawn, of_levels, poisoned


def numbered(slots: torch.Tensor, width: int = 4) -> torch.Tensor:
    """Return heads (batch, 1, tokens, width) that say which sequence and slot they are of."""
    batch = torch.arange(len(slots))[:, None] * 1000
    return (slots + batch)[:, None, :, None].expand(-1, 1, -1, width).double()


def held(floats: FloatTokens, length: int) -> list[set[int]]:
    """Return which slots each sequence finds in floats, by what is stored there."""
    slots, there = floats.slots(torch.tensor([length]))
    for kept in floats.tensors:
        assert torch.equal(kept[:, 0, :, 0][there], numbered(slots)[:, 0, :, 0][there])
    assert (slots[there] >= 0).all()
    found = [row[seen].tolist() for row, seen in zip(slots, there, strict=True)]
    assert all(len(row) == len(set(row)) for row in found)  # none twice
    return [set(row) for row in found]


def expected(start: list[int], length: int, history: History) -> list[set[int]]:
    """Return what the stock layer has in floats, sequence by sequence, behind their padding."""
    found = []
    for first in start:
        end = history.sinks + history.coded(length - first)
        tokens = range(max(length - first, 0))
        found.append({first + n for n in tokens if not history.sinks <= n < end})
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_places_hold_the_tokens_that_the_history_says(data):
    """Behind any passes and crops; what a crop brings back is put in its place by slot."""
    sizes = st.integers(0, 5)
    sinks, window = data.draw(st.tuples(sizes, sizes).filter(any))
    history = History(sinks, window)
    start = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    floats = empty_tokens(
        (len(start), 1, 4), (sinks, window), torch.tensor(start).int(), torch.double
    )
    for kept in floats.tensors:
        kept.fill_(torch.nan)
    length = 0
    for _ in range(data.draw(st.integers(1, 6))):
        tokens = data.draw(st.integers(1, 9))
        new = numbered(torch.arange(length, length + tokens).expand(len(start), -1))
        floats.write(new, new, torch.tensor([length]))
        length += tokens
        assert held(floats, length) == expected(start, length, history)
        keep = data.draw(st.integers(0, length))
        begin, end = max(keep - window, 0), min(length - window, keep)
        if begin < end:
            back = numbered(torch.arange(begin, end).expand(len(start), -1))
            floats.restore(back, back, begin)
        length = keep
        assert held(floats, length) == expected(start, length, history)
        now = slice(max(length - window, 0), length)
        slots = torch.arange(now.start, now.stop).expand(len(start), -1)
        for part in floats.read(now.start, now.stop):
            assert torch.equal(part, numbered(slots))


# stored -------------------------------------------------------------------------------------------

# (batch, tokens, heads, kv_heads, head_dim), rotary_dim, sinks, window, slot, start
STORED = {
    "step": ((2, 1, 4, 2, 64), 64, 2, 5, 13, [0, 12]),
    "first sink": ((3, 1, 2, 1, 32), 32, 3, 4, 7, [7, 5, 0]),
    "pass": ((2, 9, 2, 1, 80), 64, 3, 4, 4, [5, 0]),
    "short": ((2, 3, 2, 2, 32), 0, 1, 8, 6, [7, 2]),
    "sinks alone": ((1, 4, 2, 1, 32), 32, 6, 0, 3, [0]),
    "window alone": ((2, 5, 1, 1, 32), 16, 0, 1, 0, [0, 2]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORED)
def test_the_kernel_keeps_floats_where_the_definition_does(name, dtype, device):
    """Rows are those that are written without floats; values are what was given, to the bit."""
    shape, rotary, sinks, window, slot, start = STORED[name]
    batch, tokens, _, kv_heads, width = shape
    inputs = drawn(shape, dtype, device, rotary, seed=len(name))
    r3, position = hadamard_rotation(width), torch.tensor([slot], device=device)
    begins = torch.tensor(start, dtype=torch.int32, device=device)
    found = []
    for store, returned in (
        (gpu_store.store, True),
        (reference_store.store, True),
        (gpu_store.store, False),
    ):
        floats = empty_tokens((batch, kv_heads, width), (sinks, window), begins, dtype)
        for kept in floats.tensors:
            kept.fill_(77)
        rows = [poisoned(shape, grid, slot + tokens, 1.0, device) for grid in (ASYMMETRIC, THREE)]
        plain = [poisoned(shape, grid, slot + tokens, 1.0, device) for grid in (ASYMMETRIC, THREE)]
        out = store(*inputs, r3, *rows, position, returned, floats)
        store(*inputs, r3, *plain, position, False)
        for ours, theirs in zip(rows, plain, strict=True):
            assert all(map(torch.equal, ours.tensors, theirs.tensors))
        found.append((floats, out))
    (ours, out), (wanted, meant), (alone, none) = found
    units = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert none[1:] == (None, None)
    assert torch.equal(out[2], inputs[2].transpose(1, 2))
    assert torch.equal(ours.values, wanted.values)
    assert (out[1] - meant[1]).abs().max() <= units * meant[1].abs().max()
    for kept, same, x, mine, theirs in zip(
        ours.tensors, alone.tensors, out[1:], ours.tensors, wanted.tensors, strict=True
    ):
        assert torch.equal(kept, same)
        assert torch.equal(mine == 77, theirs == 77)  # nothing else is written
        slots, there = (part.cpu() for part in ours.slots(position + tokens))
        for b in range(batch):
            new = there[b] & (slots[b] >= slot)
            assert new.any() and torch.equal(kept[b][:, new], x[b][:, slots[b, new] - slot])


# attended -----------------------------------------------------------------------------------------

# (batch, heads, kv_heads, head_dim), capacity, length, start, sinks, window, plan
CASES = {
    "grouped": ((2, 4, 1, 64), 96, 77, [0, 13], 4, 20, Plan(16, 3, 1, 1)),
    "one split": ((1, 3, 3, 32), 64, 33, [2], 1, 8, Plan(16, 1, 1, 1)),
    "all padding": ((2, 6, 2, 80), 40, 40, [39, 40], 2, 3, Plan(16, 2, 1, 1)),
    "wide group": ((1, 9, 1, 96), 45, 31, [5], 3, 70, Plan(32, 2, 1, 1)),
    "two parts": ((1, 17, 1, 32), 32, 20, [0], 0, 5, Plan(16, 1, 1, 1)),
    "llama": ((1, 2, 1, 128), 256, 230, [3], 4, 128, Plan(64, 2, 2, 3)),
    "few tokens": ((2, 2, 1, 32), 64, 3, [0, 2], 2, 4, Plan(16, 4, 1, 1)),
    "sinks alone": ((2, 2, 1, 32), 64, 50, [0, 30], 6, 0, Plan(16, 4, 1, 1)),
    "window of one": ((2, 2, 2, 32), 64, 50, [0, 47], 0, 1, Plan(16, 2, 1, 1)),
    "behind the rows": ((2, 2, 1, 32), 64, 64, [48, 62], 3, 20, Plan(16, 4, 1, 1)),
}


def prepared(name: str, dtype: torch.dtype, device: torch.device):
    """Return a query, rows and floats whose unread parts are poison, start, and keys and values.

    Keys and values: (kv_heads, tokens, head_dim) of each sequence, in float64, as they are read.
    """
    (batch, heads, kv_heads, width), capacity, length, start, sinks, window, _ = CASES[name]
    seed, history = list(CASES).index(name), History(sinks, window)
    grids = (IntegerFormat(4, bool(seed % 2)), 1 + seed % 4)
    rows = [
        random_rows(batch, kv_heads, capacity, grid, width, device, seed + i)
        for i, grid in enumerate(grids if seed % 3 else grids[::-1])
    ]
    begins = torch.tensor(start, dtype=torch.int32, device=device)
    floats = empty_tokens((batch, kv_heads, width), (sinks, window), begins, dtype)
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(2, batch, kv_heads, length, width, generator=g).to(device, dtype)
    floats.write(*exact, torch.tensor([0], device=device))
    _, there = floats.slots(torch.tensor([length], device=device))
    whole = []
    for side, (part, kept) in enumerate(zip(rows, floats.tensors, strict=True)):
        kept.masked_fill_(~there[:, None, :, None], torch.nan)
        numbers, seen = dequantize(part, length, torch.float64).cpu(), []
        for b, first in enumerate(start):
            end = first + sinks + history.coded(length - first)
            mixed = exact[side, b].cpu().double()
            mixed[:, first + sinks : end] = numbers[b, :, first + sinks : end]
            seen.append(mixed[:, first:])
            poison(part_of(part, b), torch.tensor([min(first + sinks, end)]), end)
        whole.append(seen)
    query = torch.randn(batch, heads, 1, 2 * width, generator=g)[..., :width]
    query = (query * torch.tensor([0.01, 1.0, 6.0])[torch.arange(heads) % 3, None, None]).to(
        device, dtype
    )
    return query, rows, floats, begins, whole


def part_of(rows: PackedRows, sequence: int) -> PackedRows:
    parts = (rows.packed, rows.scale, rows.zero)
    return PackedRows(
        *(None if part is None else part[sequence : sequence + 1] for part in parts), rows.layout
    )


def by_hand(query, whole, scaling):
    """Attend in float64, sequence by sequence; zeros where there is no token."""
    found = []
    for q, k, v in zip(query.cpu().double(), *whole, strict=True):
        group = len(q) // len(k)
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        one = scaled_dot_product_attention(q, k, v, scale=scaling)
        found.append(one if k.shape[1] else torch.zeros_like(q))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
# NumPy, which interprets, minds the logarithm of an empty slot's scale
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_kernels_attend_to_codes_and_floats_as_exact_arithmetic_does(name, dtype, device):
    (_, _, _, width), _, length, _, _, _, plan = CASES[name]
    query, rows, floats, start, whole = prepared(name, dtype, device)
    scaling, tensor = 1 / math.sqrt(width), torch.tensor([length], device=device)
    exact = by_hand(query, whole, scaling)
    wanted = reference.attend(query, *rows, start, tensor, scaling, floats=floats)
    found = gpu.attend(query, *rows, start, tensor, scaling, floats=floats, plan=plan)
    assert found.shape == query.shape and found.dtype == dtype
    errors = [(x.cpu().double() - exact).abs().max().item() for x in (found, wanted)]
    # weights and queries pass through float16
    noise = 2e-6 if dtype == torch.float32 else 2.0**-11
    assert errors[0] <= 2 * errors[1] + noise * exact.abs().max()
    assert errors[1] <= (1e-5 if dtype == torch.float32 else 2.0**-8) * exact.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_exact_in_float64(name):
    query, rows, floats, start, whole = prepared(name, torch.float64, torch.device("cpu"))
    tensor = torch.tensor([CASES[name][2]])
    found = reference.attend(query, *rows, start, tensor, 0.2, floats=floats)
    assert torch.allclose(found, by_hand(query, whole, 0.2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["grouped", "one split", "llama", "behind the rows"])
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_long_bias_of_keys_is_added_to_the_scores_of_both(name, dtype, device):
    """Oracle: it is summed to coded and to exact keys in float64."""
    (batch, _, kv_heads, width), capacity, length, begins, _, _, plan = CASES[name]
    query, rows, floats, start, (keys, values) = prepared(name, dtype, device)
    g = torch.Generator().manual_seed(1)
    longest = torch.randn(kv_heads, width, generator=g)
    longest *= 600 / longest.norm(dim=1, keepdim=True)
    bias = KeyBias(longest, True, hadamard_rotation(width))
    waves = waves_of(width, capacity, 1 if name == "llama" else batch, 0)
    known = known_to(bias, waves)
    biased = [k + known[b % len(known), :, begins[b] : length] for b, k in enumerate(keys)]
    scaling, tensor = 1 / math.sqrt(width), torch.tensor([length], device=device)
    exact = by_hand(query, (biased, values), scaling)
    scores = bias.scores(query, waves.to(device))
    wanted = reference.attend(query, *rows, start, tensor, scaling, scores, floats)
    found = gpu.attend(query, *rows, start, tensor, scaling, scores, floats, plan)
    errors = [(x.cpu().double() - exact).abs().max().item() for x in (found, wanted)]
    # products with a bias keep 22 bits of float32's 24
    noise, times = (2e-6, 8) if dtype == torch.float32 else (2.0**-11, 2)
    assert errors[0] <= times * errors[1] + noise * exact.abs().max()
    assert errors[1] <= (1e-3 if dtype == torch.float32 else 1e-2) * exact.abs().max()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_many_parts_are_added(device):
    """More of them than a program of four warps adds."""
    rows = [random_rows(1, 1, 64, IntegerFormat(4, True), 32, device, i) for i in range(2)]
    start, length = (torch.tensor([n], device=device) for n in (0, 64))
    floats = empty_tokens((1, 1, 32), (2, 30), start.int(), torch.float32)
    new = torch.randn(2, 1, 1, 64, 32, generator=torch.Generator().manual_seed(0)).to(device)
    floats.write(*new, torch.zeros_like(start))
    query = torch.ones(1, 2, 1, 32, device=device)
    asked = (query, *rows, start.int(), length, 0.1)
    found = gpu.attend(*asked, floats=floats, plan=Plan(16, 128, 1, 1))
    assert torch.allclose(found, reference.attend(*asked, floats=floats), atol=1e-5)


def test_levels_are_kept_beside_floats(device):
    """Of a codec by levels; a token is read back from either place."""
    codec, shape = of_levels(64, 3), (1, 5, 2, 1, 64)
    inputs = drawn(shape, torch.float32, device, 64)
    rows = [empty_rows(1, 1, 5, codec.packed, device) for _ in range(2)]
    start = torch.zeros(1, dtype=torch.int32, device=device)
    floats = empty_tokens((1, 1, 64), (1, 2), start, torch.float32)
    gpu_store.store(*inputs, None, *rows, torch.tensor([0], device=device), False, floats)
    values = inputs[2].transpose(1, 2)
    assert torch.equal(dequantize(rows[1], 5, torch.float32), codec.round(values))
    assert torch.equal(floats.values[:, :, [0, 1 + 1, 1 + 0]], values[:, :, [0, 3, 4]])
