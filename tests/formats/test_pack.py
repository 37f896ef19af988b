"""Packed levels against bit strings put together by hand."""

import pytest
import torch

from spinlab.formats.pack import (
    pack_few_levels,
    pack_levels,
    pack_nibbles,
    packed_bytes,
    unpack_levels,
    unpack_nibbles,
)


def _byte_strings(codes: list[int], bits: int) -> list[int]:
    """Put codes into bytes as the module says, bit by bit, as strings of 0 and 1."""
    found, done = [], 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        per_byte = 8 // width
        size = -(-len(codes) // per_byte)
        padded = codes + [0] * (size * per_byte - len(codes))
        for j in range(size):
            byte = ""
            for code in padded[j::size]:  # later parts of the row are higher bits of the byte
                bit_string = f"{code:016b}"
                byte = bit_string[16 - done - width : 16 - done] + byte
            found.append(int(byte, 2))
        done += width
    return found


@pytest.mark.parametrize("n", [1, 5, 7, 8, 16, 27])
@pytest.mark.parametrize("bits", [*range(1, 16)])
@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_packed_as_bit_strings_and_come_back(bits, n, signed):
    lowest = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, n), generator=generator)
    codes[0, 0], codes[1, 0] = 0, (1 << bits) - 1
    levels = (codes + lowest).float()
    packed = pack_levels(levels, bits, lowest)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (3, packed_bytes(n, bits))
    assert packed.tolist() == [_byte_strings(row, bits) for row in codes.tolist()]
    found = unpack_levels(packed, bits, n, lowest)
    assert found.dtype == (torch.int16 if bits > 8 else torch.int8 if signed else torch.uint8)
    assert torch.equal(found.long(), codes + lowest)
    if bits <= 8:
        assert pack_few_levels(levels.numpy(), bits, lowest).tolist() == packed.tolist()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float16, torch.float64])
def test_levels_of_every_dtype_are_packed_alike(dtype):
    levels = torch.arange(-128, 128)
    for bits in (2, 3, 4, 8):
        half = 1 << (bits - 1)
        inside = levels[(levels >= -half) & (levels < half)]
        assert torch.equal(
            pack_levels(inside.to(dtype), bits, -half), pack_levels(inside, bits, -half)
        )


@pytest.mark.parametrize(("bits", "expected"), [(2, 32), (3, 48), (4, 64), (5, 80), (8, 128)])
def test_a_row_takes_its_bits(bits, expected):
    assert packed_bytes(128, bits) == expected


def test_four_bits_lie_as_nibbles_of_two_halves():
    levels = torch.arange(16).repeat(3, 1)
    assert torch.equal(pack_levels(levels, 4, 0), pack_nibbles(levels))
    assert torch.equal(pack_levels(levels - 8, 4, -8), pack_nibbles(levels))


@pytest.mark.parametrize(("signed", "low", "high"), [(True, -8, 8), (False, 0, 16)])
def test_packing_round_trips_every_level(signed, low, high):
    levels = torch.arange(low, high).repeat(3, 2)
    packed = pack_nibbles(levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 16)
    assert torch.equal(unpack_nibbles(packed, signed).long(), levels)


def test_byte_layout_is_halves():
    packed = pack_nibbles(torch.tensor([[1, 2, 3, -1]]))
    assert packed.tolist() == [[0x31, 0xF2]]
