import pytest
import torch
from torch import nn

from spinlab.config import TensorQuant, WeightsConfig
from spinlab.quant.affine import Grid
from spinlab.quant.inputs import InputPath, TokenQuantizer
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.kernels import KERNELS
from spinlab.runtime.linear import IntegerLinear
from spinlab.weights.rtn import rtn

FORMATS = [
    TensorQuant(bits=4, symmetric=True),
    TensorQuant(bits=4),
    TensorQuant(bits=4, symmetric=True, group_size=16),
    TensorQuant(bits=8),
    TensorQuant(bits=3, group_size=32),
]
QUANTIZERS = [
    TokenQuantizer(Grid(4, False)),
    TokenQuantizer(Grid(4, True), clip_ratio=0.9),
    TokenQuantizer(Grid(8, False), group_size=16),
    TokenQuantizer(Grid(8, True), group_size=32),
    TokenQuantizer(Grid(8, False)),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", list(KERNELS))
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_integer_linear_is_the_fake_quantized_one(format, quantizer, backend):
    """Oracle: dequantize both sides in float64 and multiply."""
    weight = rtn(draw(24, 64), format, WeightsConfig())
    bias, x = draw(24, seed=1), draw(2, 7, 64, seed=2)
    linear = IntegerLinear(
        weight, bias, InputPath(None, quantizer), KERNELS[backend], torch.float32
    )
    expected = quantizer.round(x).double() @ weight.dequantize(torch.float64).T + bias
    assert torch.allclose(linear(x).double(), expected, atol=1e-4)


def test_float64_shows_that_the_arithmetic_is_exact():
    weight = rtn(draw(24, 64), TensorQuant(), WeightsConfig())
    quantizer = TokenQuantizer(Grid(4, False))
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


def test_a_token_does_not_depend_on_its_batch():
    weight = rtn(draw(24, 64), FORMATS[0], WeightsConfig())
    path = InputPath(None, TokenQuantizer(Grid(4, False)))
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    x = draw(9, 64, seed=2)
    assert torch.equal(linear(x)[4:5], linear(x[4:5]))


def test_the_online_rotation_comes_before_the_quantizer():
    weight = rtn(draw(8, 20), FORMATS[0], WeightsConfig())
    quantizer, rotation = TokenQuantizer(Grid(4, False)), hadamard_rotation(20)
    path = InputPath(rotation, quantizer)
    linear = IntegerLinear(weight, None, path, KERNELS["cpu"], torch.float32)
    x = draw(3, 20, seed=2)
    expected = nn.functional.linear(
        quantizer.round(x @ rotation.dense().float()), weight.dequantize()
    )
    assert torch.allclose(linear(x), expected, atol=1e-5)
