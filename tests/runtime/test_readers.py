"""What prepares the inputs of packed products."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from spinlab.fakequant.activations import InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.map import Norm
from spinlab.rotation.online import hadamard_rotation
from spinlab.runtime.fused.modules import GateReader, NormReader, Reader
from spinlab.runtime.fused.operations import REFERENCE
from spinlab.runtime.fused.products import PackedProduct
from spinlab.runtime.kernels.formats import TokenLevels, pack_weight
from tests.runtime.kernels.test_kernel_linear import random_weight


# groups of weight and input: of finer ones of the weight the product finds sums itself
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_readers_sum_levels_where_zero_points_of_weights_meet_them(symmetric, groups):
    of_weight, of_input = groups
    packed, made = pack_weight(random_weight(24, 64, of_weight, symmetric), of_input), []

    def noted(name: str, real: Any) -> Any:
        def take(*arguments: Any, **options: Any) -> TokenLevels:
            made.append((name, real(*arguments, **options)))
            return made[-1][1]

        return take

    names = ("quantize", "norm_quantize", "gate_quantize", "rotate_quantize")
    watched = replace(REFERENCE, **{n: noted(n, getattr(REFERENCE, n)) for n in names})
    product = PackedProduct(packed, None, watched)
    quantizer = TokenQuantizer(IntegerFormat(4, False), 64 // of_input)
    turn = hadamard_rotation(64)
    x, path = torch.randn(3, 64), InputPath(None, quantizer)
    Reader(product, path, watched)(x)
    Reader(product, InputPath(turn, quantizer), watched)(x)
    norm = nn.RMSNorm(64, eps=1e-5)
    NormReader(norm, Norm("norm", 0, ("q",), 64, 1e-5), product, path, watched)(x)
    GateReader(product, path, watched).of_gate(x, x)
    assert [name for name, _ in made] == ["quantize", "rotate_quantize", *names[1:3]]
    assert all((levels.sums is None) == (symmetric or of_weight > of_input) for _, levels in made)
