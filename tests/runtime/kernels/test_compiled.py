"""What the compiler makes of the kernels for a Hopper GPU, without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = """
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from spinlab.formats import FORMATS, float_kernels, float_triton, integer_kernels
from spinlab.learn.objectives import logits_kernels
from spinlab.learn.spaces import gate_kernels
from spinlab.runtime.kernels.attention import launch as attention
from spinlab.runtime.kernels.attention.triton import attend_kernel, combine_kernel
from spinlab.runtime.kernels.attention.triton_floats import floats_kernel
from spinlab.runtime.kernels.formats import PackedWeight
from spinlab.runtime.kernels.kv import triton as kv_kernels
from spinlab.runtime.kernels.linear import launch as linear
from spinlab.runtime.kernels.linear import triton as linear_kernels
from spinlab.runtime.kernels.linear import triton_decode as decode_kernels
from spinlab.runtime.kernels.matmul import launch as groups
from spinlab.runtime.kernels.matmul.triton import outputs_kernel
from spinlab.runtime.kernels.producers import triton as producer_kernels
from spinlab.runtime.kernels.producers import triton_blocks as block_kernels
from spinlab.runtime.kernels.producers import triton_hadamard as hadamard_kernels
from spinlab.weights import sweep_kernels

def weight(width):
    empty = torch.zeros(64, 1)
    return PackedWeight(torch.zeros(64, width // 2, dtype=torch.uint8), empty, None, empty, width)


LARGE, NARROW = weight(4096), weight(32)
NUMBERS = {"s_ptr": "*fp32", "z_ptr": "*i32", "a_ptr": "*i32", "t_ptr": "*fp32", "u_ptr": "*i32",
           "c_ptr": "*i32", "bias_ptr": "*fp32", "tokens": "i32", "out": "i32"}
TILES = {"x_tiles": "tensordesc<i8[128, 64]>", "w_tiles": "tensordesc<u8[128, 64]>",
         "y_tiles": "tensordesc<bf16[128, 128]>"}
ROOM = {"x_ptr": "*i8", "w_ptr": "*u8", "y_ptr": "*bf16", "added_ptr": "*bf16",
        "part_ptr": "*i32", "count_ptr": "*i32"}
# bytes that a program may share
ROOM_OF = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
SHAPE = {"HALF": 2048, "BLOCKS": 1, "INPUT_GROUPS": 1, "WEIGHT_GROUPS": 1, "ZEROS": False,
         "BIAS": False, "ASM": True}
PREFILL = {**SHAPE, "BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "STAGES": 3, "ADDED": False,
           "PROGRAMS": 264}
DECODE = {**SHAPE, "IN": 4096, "ADDED": True, "BM": 16, "BN": 64, "BK": 128, "SPLIT": 2,
          "STAGES": 4}
OF_LEVELS = {**DECODE, "GROUP": 0}  # of what decodes, the kernel of quantized inputs alone


STRIDES = ("stride", "other_stride", "out_stride")


def instructions(kernel, numbers, constants, capability, warps=4, even=()):
    if "PDL" in kernel.arg_names:
        constants = {**constants, "PDL": capability >= 90}
    types = {**NUMBERS, **numbers, **dict.fromkeys(constants, "constexpr")}
    types = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types)
               if types[n][0] == "*" or n in even}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = compile(source, target=target, options={"num_warps": warps})
    assert compiled.metadata.shared <= ROOM_OF[capability], (capability, compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    return set(re.findall(r"(wgmma\\.mma_async\\S*|mma\\.sync\\S*)", ptx)), ptx


for added in (False, True):
    kernel, kinds = linear_kernels.prefill_kernel, {**TILES, "added_ptr": "*bf16"}
    found, ptx = instructions(kernel, kinds, {**PREFILL, "ADDED": added}, 90)
    assert found == {"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"}, found
    # weights come from registers: the first operand is a list of them, not a descriptor
    assert re.search(r"wgmma\\.mma_async\\S+ {[^}]*},\\s*{", ptx)
found, ptx = instructions(decode_kernels.decode_kernel, ROOM, OF_LEVELS, 90)
assert found == {"wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8"}, found
# the first lines of weights are asked for before the wait, which is only there from Hopper on
assert 0 < ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
_, ptx = instructions(decode_kernels.decode_kernel, ROOM, OF_LEVELS, 89)
assert "prefetch" not in ptx and "griddepcontrol" not in ptx
instructions(decode_kernels.decode_kernel, ROOM, {**OF_LEVELS, "BM": 64, "STAGES": 4}, 90)
# bytes in blocks, whose columns are loaded ahead, 16 at a time
OF_BLOCKS = {**NUMBERS, "x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*fp32", "blocks": "i32",
             "many": "i32"}
OUTPUTS = {"BLOCK": 16, "UNSIGNED": False, "ZEROS": False, "BIAS": True, "BK": 32,
           "BM": groups._BM, "BN": groups._BN}
WIDE = {"BLOCK": 4864, "BK": 64, "UNSIGNED": True, "ZEROS": True}
for capability, kind, changes in ((80, "mma.sync.aligned.m16n8k32", WIDE),
                                  (90, "wgmma.mma_async", {})):
    kinds = {**OF_BLOCKS, "x_ptr": "*u8"} if changes else OF_BLOCKS
    found, ptx = instructions(outputs_kernel, kinds, {**OUTPUTS, **changes}, capability,
                              even=("tokens", "out"))
    assert found and all(one.startswith(kind) and ".s8.s8" in one for one in found), found
    copies = re.findall(r"cp\\.async\\S+ \\[[^,]*, \\[[^,]*, (\\S+),", ptx)
    assert copies and (changes or set(copies) == {"0x10"}), copies
# what the interpreter takes and the compiler may not
GRID = {"LOW": 0, "HIGH": 15, "SYMMETRIC": False, "SHIFT": 0, "FUSED": True}
SIZES = dict.fromkeys(("tokens", "stride", "other_stride", "out_stride", "gate_stride",
                       "up_stride"), "i32")
SIZES |= dict.fromkeys(("epsilon", "clip", "factor"), "fp32")
SIZES |= dict.fromkeys(("x_ptr", "other_ptr", "gate_ptr", "up_ptr"), "*bf16")
SIZES |= {"left_ptr": "*bf16", "right_ptr": "*bf16", "levels_ptr": "*i8", "scale_ptr": "*fp32",
          "zero_ptr": "*i32", "sums_ptr": "*i32"}
ROWS = {**GRID, "GATED": False, "NORMED": True, "GAIN": True, "STEP": 1, "GROUPS": 1,
        "GROUP": 4096, "MANY": 1, "BLOCK": 4096, "SUMS": False}
instructions(producer_kernels.rows_kernel, SIZES, ROWS, 90)
ROTATED = {**GRID, "GATED": True, "ROWS": 172, "LEFT": True, "B": 64, "FIRST": 128, "SECOND": 64,
           "BLOCK": 64, "GROUP": 0, "GROUPS": 1, "SUMS": False}
found, _ = instructions(hadamard_kernels.rotate_kernel, SIZES, ROTATED, 90)
assert any("wgmma" in one and "bf16" in one for one in found), found
BLOCKS = {"GATED": False, "NORMED": True, "ALONE": False, "GAIN": True, "DEALT": False,
          "ACROSS": False, "PARTS": 2, "SHARED": False, "BLOCKS": 32, "B": 128, "BLOCK": 128,
          "PIECE": 64, "STEP": 64, "WHOLE": 4096, "STAGES": 1,
          "AS_FLOATS": False}
PARTS = {**SIZES, "many": "i32", "inverse_ptr": "*fp32", "order_ptr": "*i32", "parts_ptr": "*bf16",
         "out_ptr": "*bf16"}
PLAIN = {**BLOCKS, "NORMED": False, "GAIN": False}
DEALT, WIDE = {"x_ptr": "*fp32"}, {"parts_ptr": "*fp32"}
# the least shared memory, before Hopper and after it, and Hopper
for capability, name in ((89, "mma.sync"), (90, "mma"), (120, "mma.sync")):
    for constants, kinds in (
        (BLOCKS, {}), ({**BLOCKS, "ALONE": True, "STEP": 16}, {}),
        ({**PLAIN, "ACROSS": True}, {"out_ptr": "*fp32"}),
        ({**PLAIN, "GATED": True}, {}), ({**PLAIN, "DEALT": True}, DEALT),
        ({**PLAIN, "PARTS": 1}, WIDE), ({**PLAIN, "PARTS": 1, "ACROSS": True}, {}),
        ({**PLAIN, "PARTS": 1, "DEALT": True}, {}), ({**PLAIN, "PARTS": 1, "DEALT": True}, DEALT),
        ({**PLAIN, "GATED": True, "PARTS": 1, "ACROSS": True}, {}),
    ):
        kernel = block_kernels.blocks_kernel
        found, ptx = instructions(kernel, {**PARTS, **kinds}, constants, capability, even=STRIDES)
        single = re.findall(r"ld\\.global\\S*\\.b16|st\\.global\\.b(?:16|32)", ptx)
        assert constants["GAIN"] or not single, f"{single}: a thread moves 16 bytes at a time"
        kind = "tf32" if kinds is WIDE else "bf16"
        assert found and all(name in one and kind in one for one in found), found
        if capability == 90 and constants["STEP"] == 64:  # of many tokens
            light = constants["PARTS"] == 1 and kinds is not WIDE
            whole = {**constants, "PIECE": 128, "STAGES": 3 if light else 2}
            instructions(kernel, {**PARTS, **kinds}, whole, capability, even=STRIDES)
NORM = {"WIDTH": 4096, "STEP": 2, "BLOCK": 4096}
instructions(block_kernels.inverse_kernel, PARTS, NORM, 90)
POINTERS = {n: "*bf16" for n in ("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "r3_ptr",
                                 "queries_ptr", "k_round_ptr", "v_round_ptr", "k_floats_ptr",
                                 "v_floats_ptr")}
POINTERS |= {"position_ptr": "*i64", "start_ptr": "*i32"}
for kind in "kv":
    POINTERS |= {f"{kind}_packed_ptr": "*u8", f"{kind}_scale_ptr": "*fp16",
                 f"{kind}_zero_ptr": "*u8", f"{kind}_clip": "fp32",
                 f"{kind}_levels_ptr": "*fp32", f"{kind}_between_ptr": "*fp32"}
HEADS = {"D": 128, "HALF": 64, "ROTARY": 128, "STEP": 64, "R3": True, "K_LOWEST": 0,
         "K_HIGHEST": 15, "K_MANY": 0, "K_LENGTH": 0, "V_LOWEST": 0, "V_HIGHEST": 15, "V_MANY": 0,
         "V_LENGTH": 0, "ROUND": True, "FLOATS": False, "FUSED": True}
rest = {n: "i32" for n in kv_kernels.store_kernel.arg_names if n not in (*POINTERS, *HEADS)}
LEVELS = {**HEADS, "K_MANY": 16, "K_LENGTH": 1, "V_MANY": 4, "V_LENGTH": 3}
KEPT = {**LEVELS, "FLOATS": True}
for heads in (HEADS, {**HEADS, "ROTARY": 0}, LEVELS, KEPT, {**KEPT, "ROUND": False}):
    instructions(kv_kernels.store_kernel, {**rest, **POINTERS, "r3_scale": "fp32"}, heads, 90)
NAMES = "x_ptr gradient_ptr out_ptr ratio_ptr sums_ptr levels_ptr scale_ptr zero_ptr"
OF_ROWS = {**dict.fromkeys(NAMES.split(), "*fp32"), "levels_ptr": "*u8", "zero_ptr": "*i32"}
OF_ROWS |= {"rows": "i32", "clip": "fp32"}
TILE = {"WIDTH": 576, "BLOCK": 1024, "STEP": 4, "LOW": 0, "HIGH": 15, "SYMMETRIC": False}
for capability in (80, 90):
    instructions(integer_kernels.pull_back_kernel, OF_ROWS, {**TILE, "HALF": True}, capability)
    for known in (True, False):
        kinds = {**OF_ROWS, "clip": "fp32" if known else "*fp32"}
        coded = {**TILE, "KNOWN": known, "HALF": True}
        instructions(integer_kernels.encode_kernel, kinds, coded, capability)
        instructions(integer_kernels.round_kernel, kinds, {**coded, "ERROR": True}, capability)
OF_SMALL = {**OF_ROWS, "tokens": "i32", "peak": "fp32", "x_ptr": "*bf16", "out_ptr": "*bf16"}


def walk(name, bits, group, width):
    format = FORMATS[name](bits, True)
    tile = float_triton.tile_of(torch.empty(0, width), format, group)
    return {"KIND": float_triton.kind_of(format), "TILE": tile}


for capability, known in ((80, True), (90, False)):
    kinds = {**OF_SMALL, "clip": "fp32" if known else "*fp32"}
    # tokens of 576 numbers that share a scale, numbers that are not there, and choices of scales
    for constants in (walk("nvfp4_four_over_six", 4, 16, 576), walk("fp8", 8, 0, 35)):
        found = {**constants, "KNOWN": known, "ERROR": known}
        _, ptx = instructions(float_kernels.round_kernel, kinds, found, capability)
        assert "div.rn.f32" in ptx and "ftz" not in ptx and "div.full" not in ptx
    coded = {**walk("nvfp4_calibrated", 4, 16, 576), "KNOWN": known}
    coded["KIND"] = coded["KIND"]._replace(given=known)
    _, ptx = instructions(float_kernels.encode_kernel, kinds, coded, capability)
    assert "ld.global.v4.b32" in ptx and "st.global.v2.b32" in ptx  # 8 numbers at once
    pulled = walk("mxfp4_mse", 4, 32, 576)
    instructions(float_kernels.pull_back_kernel, OF_SMALL, pulled, capability)
OF_LOGITS = {"logits": "*bf16", "original": "*bf16", "labels": "*i64", "terms": "*fp32",
             "share": "fp32"}
for capability, teacher in ((80, True), (90, False)):
    LOSS = {"COLUMNS": 151936, "TEACHER": teacher, "BLOCK": 2048}
    instructions(logits_kernels.loss_kernel, OF_LOGITS, LOSS, capability, warps=8)
NAMES = "gate up out gradient of_gate of_up"
OF_GATE = {**dict.fromkeys(NAMES.split(), "*bf16"), "factor": "*fp32", "sums": "*fp32",
           "rows": "i32"}
for kernel in (gate_kernels.gate_kernel, gate_kernels.gate_gradient_kernel):
    GATED = {"WIDTH": 4864, "SCALED": True, "STEP": 32, "BLOCK": 128}
    instructions(kernel, OF_GATE, GATED, 80)
NAMES = "columns_ptr errors_ptr scale_ptr zero_ptr spread_ptr ahead_ptr first_ptr"
OF_COLUMNS = {**dict.fromkeys(NAMES.split(), "*fp32"), "levels_ptr": "*i16", "group_ptr": "*i32"}
OF_COLUMNS |= dict.fromkeys(("outputs", "width", "begin", "end"), "i32")
kind = float_triton.kind_of(FORMATS["mxfp8"](8, True))
SWEEP = {"COUNT": 128, "LOW": -12, "HIGH": 12, "FIRST": True, "BLOCK": 128, "LANES": 16}
for capability in (80, 90):
    for ahead in (True, False):
        kinds = {**SWEEP, "AHEAD": ahead, "KIND": kind if ahead else None}
        instructions(sweep_kernels.sweep_kernel, OF_COLUMNS, kinds, capability, warps=1)
# the tiles that are chosen for 128 tokens of floats, and for 32 inputs
FLOATS = {**DECODE, **linear._decode16_tile(128, LARGE, torch.float32)}
for name in ("INPUT_GROUPS", "WEIGHT_GROUPS", "num_warps"):
    del FLOATS[name]
OF_FLOATS = {**ROOM, "x_ptr": "*fp32", "part_ptr": "*fp32"}
instructions(decode_kernels.decode16_kernel, OF_FLOATS, FLOATS, 89, warps=2)
_, ptx = instructions(decode_kernels.decode16_kernel, OF_FLOATS, FLOATS, 90, warps=2)
assert 0 < ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
narrow = linear._decode_tile(4, NARROW)
del narrow["num_warps"]
instructions(decode_kernels.decode_kernel, ROOM, {**OF_LEVELS, "IN": 32, "HALF": 16, **narrow}, 90)
found, _ = instructions(decode_kernels.decode_kernel, ROOM, OF_LEVELS, 80)
many = linear._many_tile(LARGE)  # tokens, before Hopper
assert many.pop("num_warps") == 4
for capability in (80, 89):
    of_many, _ = instructions(
        decode_kernels.decode_kernel, ROOM, {**DECODE, **many}, capability, even=("out",)
    )
    assert of_many == found
assert found and all(".m16n8k32." in one and ".s32.s8.s8.s32" in one for one in found), found
# rows of nibbles, of grids with and without a bias of keys, and of levels, whose middle is 0
OF_PACKED = dict.fromkeys(attend_kernel.arg_names, "i32")
OF_PACKED |= dict.fromkeys(("sums_ptr", "most_ptr", "total_ptr"), "*fp32")
OF_PACKED |= dict.fromkeys(("vectors_ptr", "waves_ptr"), "*fp32")
OF_PACKED |= dict.fromkeys(("k_levels_ptr", "v_levels_ptr"), "*fp32")
OF_PACKED |= {"k_ptr": "*u16", "v_ptr": "*u16", "k_scale_ptr": "*fp16", "v_scale_ptr": "*fp16",
              "k_zero_ptr": "*u8", "v_zero_ptr": "*u8", "start_ptr": "*i32", "length_ptr": "*i64",
              "query_ptr": "*bf16", "out_ptr": "*bf16", "factor": "fp32"}
for rotary, middle in ((0, -1), (128, -1), (0, 0)):
    attend = {"GROUP": 4, "HEADS": 8, "D": 128, "PAIRS": 32, "BLOCK": 64, "WHOLE": False,
              "K_MIDDLE": middle, "V_MIDDLE": middle, "K_LEVELS": 16 * (middle == 0),
              "V_LEVELS": 8 * (middle == 0), "WIDE": False, "EVEN": True, "FAST": True,
              "ROTARY": rotary, "WAVES": rotary // 2, "PDL": True}
    even = ("capacity", "wave_batch")
    _, ptx = instructions(attend_kernel, OF_PACKED, attend, 90, warps=2, even=even)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ptx
    # packed rows go to shared memory by themselves, 16 bytes at a time, and values come back turned
    copies = re.findall(r"cp\\.async\\S+ \\[[^,]*, \\[[^,]*, (\\S+),", ptx)
    assert copies and set(copies) == {"0x10"}, copies
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx
    assert "cvt.rn.f16.u16" not in ptx  # no level is converted one by one
    assert ("tf32" in ptx) == bool(rotary)
# tokens in floats beside rows, of the largest heads, and the sum of what both found
OF_KEPT = {name: kind for name, kind in OF_PACKED.items() if name in floats_kernel.arg_names}
OF_KEPT |= dict.fromkeys(set(floats_kernel.arg_names) - OF_PACKED.keys(), "i32")
for kind, name, at_once in (("bf16", "bf16", 64), ("fp16", "f16", 64), ("fp32", "tf32", 32)):
    kinds = {**OF_KEPT, **dict.fromkeys(("query_ptr", "k_ptr", "v_ptr"), "*" + kind)}
    assert at_once == attention._PLACES // (1 + (kind == "fp32"))
    heads = ((80, 128, 0, at_once), (89, 256, 0, at_once), (90, 96, 96, 16), (90, 96, 0, at_once),
             (120, 256, 0, at_once))
    for capability, width, rotary, block in heads:
        attend = {"GROUP": 9, "HEADS": 16, "D": width, "BLOCK_D": 1 << (width - 1).bit_length(),
                  "BLOCK": block, "WIDE": kind == "fp32", "ROTARY": rotary, "WAVES": rotary and 64}
        found, _ = instructions(floats_kernel, kinds, attend, capability, attention._FLOATS_WARPS)
        assert any(one.endswith(f"f32.{name}.{name}.f32") for one in found), found
        assert rotary or all(f".{name}." in one for one in found), found
        assert not any("wgmma" in one for one in found), found
ADDED = {"sums_ptr": "*fp32", "most_ptr": "*fp32", "total_ptr": "*fp32", "out_ptr": "*bf16",
         "splits": "i32"}
for parts in (16, 128, 256):
    sizes, warps = {"D": 128, "BLOCK_D": 128, "BLOCK": parts}, attention._adding(parts)
    instructions(combine_kernel, ADDED, sizes, 90, warps=warps)
"""


def test_kernels_compile_and_hopper_multiplies_integers_by_wgmma(tmp_path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[3]  # a GPU node may run from a checkout that is not installed
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    script = tmp_path / "compiled.py"  # the compiler reads sources of kernels from files
    script.write_text(COMPILED)
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
