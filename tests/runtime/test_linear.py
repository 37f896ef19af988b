"""Integer linears against int64 and fake quantization, to the last bit."""

import copy

import pytest
import torch
from torch import nn

from spinlab.config import ClipSearch, TensorQuant
from spinlab.fakequant.activations import IdentityCache, InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.kernels.matmul import KERNELS
from spinlab.runtime.stock.linear import IntegerLinear, LinearPart
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import rtn

FORMATS = [
    TensorQuant(bits=4, symmetric=True),
    TensorQuant(bits=4),
    TensorQuant(bits=4, symmetric=True, group_size=16),
    TensorQuant(bits=8),
    TensorQuant(bits=3, group_size=32),
]
QUANTIZERS = [
    TokenQuantizer(IntegerFormat(4, False)),
    TokenQuantizer(IntegerFormat(4, True), clip_ratio=0.9),
    TokenQuantizer(IntegerFormat(8, False), group_size=16),
    TokenQuantizer(IntegerFormat(8, True), group_size=32),
    TokenQuantizer(IntegerFormat(8, False)),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", list(KERNELS))
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_integer_linear_is_the_fake_quantized_one(format, quantizer, backend):
    """Oracle: dequantize both sides in float64 and multiply."""
    weight = rtn(draw(24, 64), format, ClipSearch())
    bias, x = draw(24, seed=1), draw(2, 7, 64, seed=2)
    linear = IntegerLinear(
        weight, bias, InputPath(None, quantizer), KERNELS[backend], torch.float32
    )
    expected = quantizer.round(x).double() @ weight.dequantize(torch.float64).T + bias
    assert torch.allclose(linear(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("backend", list(KERNELS))
def test_no_tokens_give_no_outputs(backend, group):
    """An expert may be given none."""
    weight = rtn(draw(24, 64), TensorQuant(symmetric=True, group_size=group), ClipSearch())
    path = InputPath(None, TokenQuantizer(IntegerFormat(4, False), group))
    linear = IntegerLinear(weight, None, path, KERNELS[backend], torch.float32)
    assert linear(draw(2, 0, 64)).shape == (2, 0, 24)


def test_float64_shows_that_the_arithmetic_is_exact():
    weight = rtn(draw(24, 64), TensorQuant(), ClipSearch())
    quantizer = TokenQuantizer(IntegerFormat(4, False))
    x = draw(5, 64, seed=2).double()
    linear = IntegerLinear(weight, None, InputPath(None, quantizer), KERNELS["cpu"], torch.float64)
    expected = quantizer.round(x) @ weight.dequantize(torch.float64).T
    assert torch.allclose(linear(x), expected, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 128])
def test_accumulations_are_bit_equal_to_the_reference(tokens):
    """Also at the extremes, where a saturating instruction would show; oracle: int64."""
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(-128, 128, (tokens, 576), generator=g).to(torch.int8)
    weight = torch.randint(-128, 128, (40, 576), generator=g).to(torch.int8)
    levels[0], weight[0] = 127, -128
    expected = levels.long() @ weight.long().T
    for matmul in KERNELS.values():
        found = matmul(levels, weight)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_several_signed_rows_are_multiplied_from_the_other_side(tokens):
    """As wide as whole rows of blocks get; oracle: the bytes in int64."""
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 128, (tokens, 576), generator=g).to(torch.uint8)
    weight = torch.randint(-128, 128, (40, 576), generator=g).to(torch.int8)
    found = KERNELS["cpu"](levels.view(torch.int8), weight)
    assert torch.equal(found.long(), levels.long() @ weight.long().T)


def test_a_token_does_not_depend_on_its_batch():
    weight = rtn(draw(24, 64), FORMATS[0], ClipSearch())
    path = InputPath(None, TokenQuantizer(IntegerFormat(4, False)))
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    x = draw(9, 64, seed=2)
    assert torch.equal(linear(x)[4:5], linear(x[4:5]))


def test_the_online_rotation_comes_before_the_quantizer():
    weight = rtn(draw(8, 20), FORMATS[0], ClipSearch())
    quantizer, rotation = TokenQuantizer(IntegerFormat(4, False)), hadamard_rotation(20)
    path = InputPath(rotation, quantizer)
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    x = draw(3, 20, seed=2)
    expected = nn.functional.linear(
        quantizer.round(x @ rotation.dense().float()), weight.dequantize()
    )
    assert torch.allclose(linear(x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_few_tokens_give_the_bits_of_many(format, quantizer, dtype, monkeypatch):
    weight = rtn(draw(24, 64), format, ClipSearch())
    path, bias = InputPath(None, quantizer), draw(24, seed=1)
    linear = IntegerLinear(weight, bias, path, KERNELS["cpu"], dtype)
    x = draw(2, 5, 64, seed=torch.seed() % 2**31).to(dtype)
    few = linear(x)
    monkeypatch.setattr("spinlab.formats.twins.TWINS", {})
    assert few.dtype == dtype
    assert torch.equal(few, linear(x))


def test_outputs_are_exact_integers_times_both_scales():
    """Bit for bit the formula of `spinlab.runtime.kernels.formats`, written out in int64."""
    weight = rtn(draw(24, 64), TensorQuant(bits=4), ClipSearch())
    quantizer = TokenQuantizer(IntegerFormat(4, False))
    linear = IntegerLinear(weight, None, InputPath(None, quantizer), KERNELS["cpu"], torch.float32)
    x = draw(5, 64, seed=2)
    encoded = quantizer.encode(x)
    inputs = (encoded.levels - encoded.zero)[:, 0].long()
    weights = weight.levels.long() - weight.zero.long()
    expected = (inputs @ weights.T).float() * (encoded.scale[:, 0] * weight.scale.T)
    assert torch.equal(linear(x), expected)


def test_linears_of_one_input_are_multiplied_once_and_keep_nothing():
    weights = [rtn(draw(rows, 64, seed=rows), FORMATS[1], ClipSearch()) for rows in (24, 8, 8)]
    path = InputPath(None, TokenQuantizer(IntegerFormat(4, False)))
    calls = []

    def matmul(levels, weight):
        calls.append(1)
        return KERNELS["cpu"](levels, weight)

    def linear(weight):
        return IntegerLinear(weight, None, path, matmul, torch.float32)

    stacked = QuantizedWeight(
        *(torch.cat([getattr(w, part) for w in weights]) for part in ("levels", "scale", "zero")),
        format=weights[0].format,
    )
    once, whole = IdentityCache(3), linear(stacked)
    parts = [LinearPart(whole, once, (24, 8, 8), index) for index in range(3)]
    for seed in (2, 3):
        x = draw(3, 64, seed=seed)
        expected = [linear(weight)(x) for weight in weights]
        calls.clear()
        found = [part(x) for part in parts]
        assert len(calls) == 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert once._last is None
    before = parts[0](x)
    x.mul_(2)  # a power of two scales the output, and the old one must not come back
    assert torch.equal(parts[1](x), 2 * expected[1])
    assert torch.equal(before, expected[0])


def test_a_linear_moves_and_copies_with_its_tables():
    weight = rtn(draw(24, 64), FORMATS[1], ClipSearch())
    path, x = InputPath(None, TokenQuantizer(IntegerFormat(4, False))), draw(3, 64, seed=2)
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    linear(x)
    copied = copy.deepcopy(linear)
    copied.scale.mul_(2)
    assert torch.equal(copied(x), 2 * linear(x))
    moved = linear.to(torch.device("cpu"), torch.float64)
    assert torch.allclose(moved(x), copied(x) / 2)
    assert moved.scale.dtype == torch.float64


def test_a_linear_takes_the_tables_that_are_loaded():
    weight = rtn(draw(24, 64), FORMATS[1], ClipSearch())
    path, x = InputPath(None, TokenQuantizer(IntegerFormat(4, False))), draw(3, 64, seed=2)
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    before = linear(x).clone()
    state = {name: t.clone() for name, t in linear.state_dict().items()}
    state["scale"].mul_(2)
    linear.load_state_dict(state, assign=True)
    assert torch.equal(linear(x), 2 * before)
