"""Attention over packed rows against exact arithmetic."""

import math
import os
import subprocess
import sys

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.kv.base import PackedLayout
from spinlab.runtime.kernels.attention import launch as gpu
from spinlab.runtime.kernels.attention import reference
from spinlab.runtime.kernels.attention.launch import Plan
from spinlab.runtime.kernels.kv.rows import PackedRows, empty_rows

# Triton's interpreter cuts bfloat16 off where a GPU rounds
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()


def random_rows(batch, heads, capacity, grid, width, device, seed) -> PackedRows:
    g = torch.Generator().manual_seed(seed)
    rows = empty_rows(batch, heads, capacity, PackedLayout(grid, width), "cpu")
    rows.packed.random_(0, 256, generator=g)
    rows.scale.uniform_(0.01, 0.3, generator=g)
    if rows.zero is not None:
        rows.zero.random_(3, 13, generator=g)
    zero = None if rows.zero is None else rows.zero.to(device)
    return PackedRows(rows.packed.to(device), rows.scale.to(device), zero, rows.layout)


def poison(rows: PackedRows, start, length) -> None:
    """Make everything outside of start..length-1 such that its use would show."""
    for sequence, first in enumerate(start.tolist()):
        for outside in (slice(0, first), slice(length, None)):
            rows.scale[sequence, :, outside] = torch.nan
            rows.packed[sequence, :, outside] = 255


def brute_force(query, keys, values, start, length, scaling):
    """One sequence and head at a time, in float64, from levels read one by one."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.packed.shape[1]
    half = query.shape[3] // 2

    def numbers(rows, b, h, n):
        byte = rows.packed[b, h, n].cpu().long()
        levels = torch.cat((byte % 16, byte // 16)).double()
        zero = 8 if rows.zero is None else float(rows.zero[b, h, n])
        assert len(levels) == 2 * half
        return (levels - zero) * float(rows.scale[b, h, n])

    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            slots = range(int(start[b]), length)
            k = torch.stack([numbers(keys, b, h // group, n) for n in slots])
            v = torch.stack([numbers(values, b, h // group, n) for n in slots])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_attends_as_exact_arithmetic_does(name, dtype, device):
    (batch, heads, kv_heads, width), capacity, length, start, plan = CASES[name]
    seed = list(CASES).index(name)
    grids = [IntegerFormat(4, bool(seed & bit)) for bit in (1, 2)]
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
    found = gpu.attend(query, *rows, start, tensor, scaling, plan)
    assert found.shape == query.shape and found.dtype == dtype
    errors = [(x.cpu().double() - exact).abs().max().item() for x in (found, wanted)]
    # weights and queries pass through float16
    noise = 2e-6 if dtype == torch.float32 else 2.0**-11
    assert errors[0] <= 2 * errors[1] + noise * exact.abs().max()


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
    found = gpu.attend(query, *rows, start, length, 0.05, Plan(16, 2, 1, 1))
    assert (found.double() - exact).abs().max() <= 2.0**-9 * exact.abs().max() + 2.0**-24


def test_a_sequence_without_slots_gives_zeros(device):
    rows = [random_rows(2, 1, 32, IntegerFormat(4, True), 32, device, i) for i in range(2)]
    query = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0)).to(device)
    start = torch.tensor([0, 8], dtype=torch.int32, device=device)
    length = torch.tensor([8], device=device)
    for attend in (reference.attend, lambda *a: gpu.attend(*a, Plan(16, 2, 1, 1))):
        found = attend(query, *rows, start, length, 1.0)
        assert not found[1].any() and found[0].isfinite().all()


def test_plans_fill_the_device_and_split_no_short_context():
    cpu = torch.device("cpu")
    assert gpu.plan_of(1, 8192, cpu).splits == 8
    assert gpu.plan_of(1, 100, cpu).splits == 1
    assert gpu.plan_of(64, 8192, cpu).splits == 1


def test_slots_that_were_never_written_count_as_zeros(device):
    rows = [
        empty_rows(1, 1, 32, PackedLayout(IntegerFormat(4, False), 32), device) for _ in range(2)
    ]
    query = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0)).to(device)
    start, length = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([20])
    found = gpu.attend(query, *rows, start, length.to(device), 1.0, Plan(16, 1, 1, 1))
    assert not found.any()


COMPILED = """
import re

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from spinlab.runtime.kernels.attention.triton import attend_kernel

types = dict.fromkeys(attend_kernel.arg_names, "i32")
types |= dict.fromkeys(("sums_ptr", "most_ptr", "total_ptr"), "*fp32")
types |= {"k_ptr": "*u16", "v_ptr": "*u16", "k_scale_ptr": "*fp16", "v_scale_ptr": "*fp16",
          "k_zero_ptr": "*u8", "v_zero_ptr": "*u8", "start_ptr": "*i32", "length_ptr": "*i64",
          "query_ptr": "*bf16", "out_ptr": "*bf16", "factor": "fp32"}
constants = {"GROUP": 4, "HEADS": 8, "D": 128, "PAIRS": 32, "BLOCK": 64, "WHOLE": False,
             "K_MIDDLE": -1, "V_MIDDLE": -1, "WIDE": False, "EVEN": True, "FAST": True,
             "PDL": True}
types |= dict.fromkeys(constants, "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types)
           if types[n][0] == "*" or n == "capacity"}
source = ASTSource(attend_kernel, types, constexprs=constants, attrs=aligned)
options = {"num_warps": 2, "num_stages": 3}
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ptx
# packed rows go to shared memory by themselves, 16 bytes at a time, and values come back turned
copies = re.findall(r"cp\\.async\\S+ \\[[^,]*, \\[[^,]*, (\\S+),", ptx)
assert copies and set(copies) == {"0x10"}, copies
assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx
assert "cvt.rn.f16.u16" not in ptx  # no level is converted one by one
"""


def test_a_compiled_kernel_unpacks_what_the_tensor_cores_take(tmp_path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
