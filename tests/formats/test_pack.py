import pytest
import torch

from spinlab.formats.pack import pack_nibbles, unpack_nibbles


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
