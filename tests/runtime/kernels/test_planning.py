"""Launches are collected as another GPU would be given them."""

import pytest
import torch

from spinlab.bench.methods import hadamards
from spinlab.bench.runners import Ours, Setting
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.runtime.fused.operations import triton_operations
from spinlab.runtime.kernels.formats import PackedWeight
from spinlab.runtime.kernels.launch import GPU, gpu_of, planning
from spinlab.runtime.kernels.linear import launch as linear
from spinlab.runtime.kernels.producers.blocks import turned

KIB = 1024
AMPERE = GPU((8, 0), 108, 163 * KIB, 164 * KIB)
ADA = GPU((8, 9), 128, 99 * KIB, 100 * KIB)
HOPPER = GPU((9, 0), 132, 227 * KIB, 228 * KIB)
SMALL = GPU((12, 0), 170, 99 * KIB, 100 * KIB)  # after Hopper


def launches_of(gpu, tokens=150):
    setting, cpu = Setting("smollm2_135m", 1, tokens, 1), torch.device("cpu")
    with torch.inference_mode(), planning(gpu) as found:
        runner = Ours(setting, triton_operations(), cpu, hadamards)
        runner.prefill(torch.zeros(1, tokens, dtype=torch.long), tokens)
    return found


def named(launches, name):
    return [launch for launch in launches if launch.kernel.fn.__name__ == name]


@pytest.mark.parametrize(
    "gpu", [AMPERE, ADA, HOPPER, SMALL], ids=["ampere", "ada", "hopper", "small"]
)
def test_a_network_is_cut_for_a_gpu_that_is_not_there(gpu):
    launches = launches_of(gpu)
    products = named(launches, "prefill_kernel"), named(launches, "decode_kernel")
    by_descriptors, by_pointers = (len(found) for found in products)
    assert (by_descriptors, by_pointers) == ((4, 0) if gpu is HOPPER else (0, 4))
    for launch in products[0]:
        assert launch.grid == (launch.constants["PROGRAMS"],)
        assert launch.constants["PROGRAMS"] <= 2 * gpu.multiprocessors
    for launch in products[1]:  # 150 tokens in tiles of 64, outputs in tiles of 128
        out = launch.arguments[launch.kernel.arg_names.index("out")]
        assert launch.grid == (3 * -(-out // launch.constants["BN"]), 1)
    for launch in launches:
        assert launch.constants["PDL"] == launch.options["launch_pdl"]
        assert gpu in (HOPPER, SMALL) or not launch.constants["PDL"]
        names = [*launch.kernel.arg_names[len(launch.arguments) :]]
        assert set(names) == launch.constants.keys()
    assert any(launch.constants["PDL"] for launch in launches) == (gpu in (HOPPER, SMALL))


def test_what_lies_between_two_rotations_is_filled_up_to_whole_tiles():
    """So that channels begin at multiples of 16, and a thread takes 16 bytes of one."""
    turns = torch.eye(128, dtype=torch.float64).repeat(2, 1, 1)
    rotation = ScaledDual(dual=DualTransform(turns, torch.arange(256), turns), rounded=True)
    for tokens, filled in ((1, 16), (16, 16), (70, 128), (150, 192)):
        with planning(HOPPER) as launches:
            found = turned(torch.zeros(tokens, 256, dtype=torch.bfloat16), rotation)
        assert found.shape == (tokens, 256)
        first, second = (
            dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
            for launch in named(launches, "blocks_kernel")
        )
        assert (first["out_stride"], second["stride"], second["out_stride"]) == (
            filled,
            filled,
            256,
        )


def weight_of(out, width):
    nibbles, ones = torch.empty(out, width // 2, dtype=torch.uint8), torch.ones(out, 1)
    return PackedWeight(nibbles, ones, None, ones, width)


@pytest.mark.parametrize(
    ("out", "width", "levels", "floats"),
    [
        (4096, 4096, (4, 1), (5, 4)),
        (12288, 4096, (4, 1), (4, 2)),
        (22016, 4096, (3, 1), (4, 1)),
        (4096, 11008, (4, 4), (5, 4)),
        (14336, 4096, (4, 1), (5, 1)),
        (1024, 4096, (4, 4), (5, 8)),  # of a few outputs shorter parts give work to more programs
        (2560, 2048, (4, 2), (5, 4)),
    ],
)
def test_fewer_programs_load_further_ahead(out, width, levels, floats):
    """Steps that are on their way and parts that columns are cut in, as the fastest were.

    For 64 tokens of levels and for one of floats; where less is shared, there is room for fewer
    of the former. For 128 tokens of levels nothing else was tried.
    """
    weight = weight_of(out, width)
    for gpu in (HOPPER, ADA):
        with planning(gpu):
            many = linear._decode_tile(64, weight)
            one = linear._decode16_tile(1, weight, torch.bfloat16)
            most = linear._decode_tile(128, weight)
        if gpu is HOPPER:
            assert (many["STAGES"], many["SPLIT"]) == levels
            assert (one["STAGES"], one["SPLIT"]) == floats
        assert gpu is HOPPER or many["STAGES"] == 3
        assert most["STAGES"] == 3


@pytest.mark.parametrize(
    ("tokens", "width", "size", "many"),
    [  # the fastest of those that were timed with pieces of 128 and 64 numbers
        (2048, 4096, 128, 4),
        (8192, 4096, 128, 8),
        (2048, 11008, 128, 6),
        (2048, 4096, 64, 4),
        # as few steps one after the other as can be
        (512, 18944, 128, 3),
        (128, 11008, 128, 1),
        (16, 4096, 64, 1),
    ],
)
def test_programs_take_tiles_in_turn_so_that_all_end_together(tokens, width, size, many):
    matrix = torch.eye(size, dtype=torch.float64).expand(width // size, size, size)
    with planning(HOPPER) as launches:
        rotation = ScaledDual(dual=BlockRotation(matrix), rounded=True)
        turned(torch.empty(tokens, width, dtype=torch.bfloat16), rotation)
    (launch,) = named(launches, "blocks_kernel")
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    assert given["many"] == many
    tiles = -(-tokens // launch.constants["STEP"])
    assert (launch.grid[0] - 1) * many < tiles <= launch.grid[0] * many


@pytest.mark.parametrize(("rounded", "stages"), [(True, 3), (False, 2)])
def test_whole_blocks_of_many_tokens_are_turned_and_loaded_ahead_where_there_is_room(
    rounded, stages
):
    """Rounded matrices leave room for one tile more; few tokens and other GPUs get half blocks."""
    matrices = torch.eye(128, dtype=torch.float64).repeat(2, 1, 1)
    rotation = ScaledDual(dual=BlockRotation(matrices), rounded=rounded)
    found = {}
    for gpu in (ADA, HOPPER):
        for tokens in (16, 100, 150):
            with planning(gpu) as launches:
                turned(torch.empty(tokens, 256, dtype=torch.bfloat16), rotation)
            (launch,) = named(launches, "blocks_kernel")
            found[gpu, tokens] = launch.constants["PIECE"], launch.constants["STAGES"]
    half = dict.fromkeys(found, (64, 1))
    assert found == half | {(HOPPER, 150): (128, stages)}


def test_plans_end_and_stand_in_each_other():
    cpu = torch.device("cpu")
    before = gpu_of(cpu)
    with planning(HOPPER), pytest.raises(ZeroDivisionError):
        assert gpu_of(cpu) is HOPPER
        with planning(ADA):
            assert gpu_of(cpu) is ADA
        assert gpu_of(cpu) is HOPPER
        _ = 1 / 0
    assert gpu_of(cpu) is before
