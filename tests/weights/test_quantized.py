"""Quantized weights as values: files, bytes, bits."""

import pytest
import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.weights.quantized import effective_bits, load_weights, save_weights
from spinlab.weights.rtn import round_to_nearest, rtn

FORMATS = [
    TensorQuant(bits=4, symmetric=True),
    TensorQuant(bits=4),
    TensorQuant(bits=3, group_size=8),
    TensorQuant(bits=2, symmetric=True),
    TensorQuant(bits=8),
    TensorQuant(bits=12, symmetric=True),
]


def random_weight(rows: int = 6, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_saved_weights_come_back_as_the_same_integers(tmp_path, format):
    weights = {"a.b": rtn(random_weight(), format, ClipSearch())}
    save_weights(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")["a.b"]
    assert torch.equal(loaded.levels, weights["a.b"].levels)
    assert torch.equal(loaded.dequantize(), weights["a.b"].dequantize())


def test_weights_of_different_grids_share_a_file(tmp_path):
    weights = {f"w{i}": rtn(random_weight(), f, ClipSearch()) for i, f in enumerate(FORMATS)}
    save_weights(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert {name: w.format for name, w in loaded.items()} == {
        n: w.format for n, w in weights.items()
    }
    for name, weight in weights.items():
        assert torch.equal(loaded[name].dequantize(), weight.dequantize())


def test_no_weights_at_all_are_saved_and_loaded(tmp_path):
    save_weights({}, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors") == {}


def test_a_split_stack_is_saved_whole(tmp_path):
    """Its parts share memory, which tensors of a safetensors file may not."""
    for format in FORMATS:
        whole = rtn(random_weight(), format, ClipSearch())
        parts = dict(zip("ab", whole.split([2, 4]), strict=True))
        save_weights(parts, tmp_path / "w.safetensors")
        loaded = load_weights(tmp_path / "w.safetensors")
        found = torch.cat([loaded[name].dequantize() for name in "ab"])
        assert torch.equal(found, whole.dequantize())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_weight_moves_further_than_half_a_level(format):
    weight = random_weight()
    found = round_to_nearest(weight, format, 1.0)
    step = found.scale.repeat_interleave(weight.shape[1] // found.groups, dim=1)
    assert ((found.dequantize() - weight).abs() <= 0.52 * step).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12])
def test_levels_are_stored_in_their_own_bits(bits):
    found = rtn(random_weight(), TensorQuant(bits=bits, symmetric=True), ClipSearch())
    assert found.tensors()["levels"].shape == (6, 32 * bits / 8)
    assert found.tensors()["levels"].dtype == torch.uint8


def test_a_width_that_fills_no_bytes_comes_back(tmp_path):
    weights = {"w": rtn(random_weight(3, 27), TensorQuant(bits=3), ClipSearch())}
    save_weights(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")["w"]
    assert torch.equal(loaded.levels, weights["w"].levels)


def test_effective_bits_count_scales_and_zeros():
    """128 weights a group: their bits + 32 of scale + 16 of zero."""
    numbers = {"w": 512}
    for bits in (2, 3, 4):
        format = TensorQuant(bits=bits, group_size=128)
        weights = {"w": rtn(random_weight(2, 256), format, ClipSearch())}
        assert effective_bits(weights, numbers) == bits + 48 / 128
    some = {**numbers, "one more": 3 * sum(numbers.values())}  # in 16 bits
    assert effective_bits(weights, some) == (4 + 48 / 128 + 3 * 16) / 4
    assert effective_bits({}, numbers) == 16


def test_the_clip_search_lowers_the_error_it_minimizes():
    weight = random_weight(16, 256)
    format = TensorQuant(bits=4, symmetric=True)
    errors = [
        (rtn(weight, format, ClipSearch(search=on)).dequantize() - weight).abs().pow(2.4).sum()
        for on in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]
