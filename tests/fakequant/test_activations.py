"""What linears read: rotated, rounded, once for all of one input."""

import pytest
import torch

from spinlab.errors import InputError
from spinlab.fakequant.activations import InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer, check_group
from spinlab.rotation.online import hadamard_rotation


def test_decoded_levels_are_the_fake_quantized_values():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    for quantizer in (
        TokenQuantizer(IntegerFormat(4, False)),
        TokenQuantizer(IntegerFormat(4, True), clip_ratio=0.9),
        TokenQuantizer(IntegerFormat(8, False), group_size=8),
    ):
        assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer.round(x))


def test_the_gradient_goes_straight_through():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    TokenQuantizer(IntegerFormat(4, False)).round(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_tokens_do_not_share_a_range():
    quantizer = TokenQuantizer(IntegerFormat(4, False))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    loud = x * torch.tensor([[1.0], [1000.0]])
    assert torch.allclose(quantizer.round(loud)[0], quantizer.round(x)[0])


def test_readers_of_one_tensor_share_the_work():
    calls = []
    path = InputPath(hadamard_rotation(8), TokenQuantizer(IntegerFormat(4, False)), readers=3)
    path.rotation.register_forward_pre_hook(lambda m, a: calls.append(1))
    x = torch.randn(2, 8)
    first, second, third = path(x), path(x), path(x)
    assert len(calls) == 1
    assert first is second is third
    path(x)  # a fourth reader is a new round: nothing is kept beyond the last one
    assert len(calls) == 2


def test_a_tensor_changed_in_place_is_not_taken_for_the_old_one():
    path = InputPath(None, TokenQuantizer(IntegerFormat(4, False)), readers=2)
    x = torch.ones(1, 4)
    before = path(x)
    x.mul_(2)
    assert torch.allclose(path(x), 2 * before)


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(InputError, match=r"quant.x=7 does not divide 32"):
        check_group("quant.x", 7, 32, "q_proj")
