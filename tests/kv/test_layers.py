"""Layers of the cache: what they return is what they keep, however tokens come and go."""

import pytest
import torch

from spinlab.formats import IntegerFormat
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.layers import RowLayer


@pytest.mark.parametrize(
    "codec", [AffineCodec(IntegerFormat(4, False), 8), None], ids=["coded", "floats"]
)
def test_a_layer_that_was_reset_is_empty(codec):
    """It holds what comes after, and no zeros or decoded rows of before."""
    layer = RowLayer(codec, codec)
    first, second = torch.randn(2, 2, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    layer.append(*first)
    layer.reset()
    assert layer.tokens == 0
    layer.reset()
    found = torch.stack(layer.append(*second))
    assert torch.equal(found, second if codec is None else codec.round(second))


@pytest.mark.parametrize("kept", [0, 1 << 18])
def test_decoded_rows_are_those_of_the_coded_ones(kept, monkeypatch):
    """Through appending, cropping and reordering, whether or not decoded rows are kept."""
    monkeypatch.setattr("spinlab.kv.layers._KEPT", kept)
    codec = AffineCodec(IntegerFormat(4, False), 8)
    layer = RowLayer(codec, codec)
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    change = [
        lambda: None,
        lambda: layer.crop(layer.tokens - 2),
        lambda: layer.reorder(torch.tensor([1, 0])),
    ]
    for index in range(8):
        if index == 6:
            layer.reset()
        change[index % 3]()
        new = torch.randn(2, 2, 3, 1 + index % 2, 8, generator=g)
        keys, values = layer.append(*new)
        assert torch.equal(keys, codec.decode(layer.keys, torch.float32))
        assert torch.equal(values, codec.decode(layer.values, torch.float32))
        assert torch.equal(keys[..., -new.shape[-2] :, :], codec.round(new[0]))
