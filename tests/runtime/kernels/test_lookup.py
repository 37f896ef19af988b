"""What the instructions that look levels up do, carried out one by one."""

import re

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from spinlab.runtime.kernels.attention.triton_rows import OF_EIGHT, OF_SIXTEEN, table, words


@triton.jit
def _write_words(levels_ptr, out_ptr, MANY: tl.constexpr):
    found = words(table(levels_ptr, MANY, False))
    for index in tl.static_range(8):
        tl.store(out_ptr + index, found[index])


def registers_of(levels: np.ndarray) -> list[int]:
    """Return low bytes of four levels in each of four registers, then high ones."""
    bits = levels.view(np.uint16).astype(int)
    bits = [bits[index if index < len(bits) else 0] for index in range(16)]
    return [sum((bits[4 * k + j] >> shift & 255) << 8 * j for j in range(4))
            for shift in (0, 8) for k in range(4)]  # fmt: skip


@pytest.mark.parametrize("many", [4, 8, 16])
def test_levels_lie_in_registers_as_instructions_take_them(many, device):
    levels = np.sort(np.random.default_rng(0).normal(size=many)).astype(np.float16)
    found = torch.zeros(8, dtype=torch.int32, device=device)
    _write_words[(1,)](torch.from_numpy(levels).to(device), found, many)
    assert [word & 0xFFFFFFFF for word in found.tolist()] == registers_of(levels)


def permuted(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX's prmt.b32: of eight bytes, those that four nibbles choose, or their signs."""
    whole = low.astype(np.uint64) | high.astype(np.uint64) << 32
    found = np.zeros_like(low)
    for place in range(4):
        choice = (selector >> (4 * place)) & 15
        byte = (whole >> (8 * (choice & 7)).astype(np.uint64)) & 255
        sign = np.where(byte & 128, 255, 0)
        byte = np.where(choice & 8, sign, byte).astype(np.uint32)
        found |= byte << np.uint32(8 * place)
    return found


def chosen(a, b, c, table):
    """PTX's lop3.b32."""
    found = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = [x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            found |= terms[0] & terms[1] & terms[2]
    return found


OPERATIONS = {
    "and.b32": np.bitwise_and,
    "shr.b32": np.right_shift,
    "shl.b32": np.left_shift,
    "prmt.b32": permuted,
    "lop3.b32": lambda a, b, c, table: chosen(a, b, c, int(table.flat[0])),
}


def carried_out(text: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Return what a block of assembly writes to its four outputs; inputs begin at $4."""
    registers = {f"${4 + index}": value for index, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full_like(inputs[0], int(name, 0))

    for line in re.findall(r"[^;{}]+;", text):
        operation, rest = line.strip(" \n;").split(" ", 1)
        names = [name.strip() for name in rest.split(",")]
        if operation != ".reg":
            registers[names[0]] = OPERATIONS[operation](*map(value, names[1:]))
    return [registers[f"${index}"] for index in range(4)]


@pytest.mark.parametrize(("text", "many"), [(OF_EIGHT, 4), (OF_EIGHT, 8), (OF_SIXTEEN, 16)])
def test_every_nibble_of_every_pair_finds_its_level(text, many):
    drawn = np.random.default_rng(0)
    levels = np.sort(drawn.normal(size=many)).astype(np.float16)
    pairs = np.arange(65536, dtype=np.uint32) & (many - 1) * 0x1111
    others = drawn.permutation(pairs)
    # of each pair
    tables = [np.full_like(pairs, word) for word in registers_of(levels) for _ in range(2)]
    found = carried_out(text.value, [pairs | others << 16, *tables])
    for index, halves in enumerate(found):
        for rows, word in ((pairs, halves & 0xFFFF), (others, halves >> 16)):
            wanted = levels[(rows >> 4 * index) & 15]
            assert np.array_equal(word.astype(np.uint16).view(np.float16), wanted)
