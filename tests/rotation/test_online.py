"""Online rotations against dense products."""

import pytest
import torch

from spinlab.errors import ResultError
from spinlab.rotation.hadamard import hadamard_matrix
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from tests.live import Live


@pytest.mark.parametrize("n", [8, 20, 36, 64, 576, 1536])
def test_two_small_products_are_the_dense_hadamard(n):
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = hadamard_matrix(n).double() / n**0.5
    assert torch.allclose(hadamard_rotation(n)(x), x @ dense, atol=1e-12)


def test_an_unsymmetric_kronecker_product_acts_from_the_right():
    g = torch.Generator().manual_seed(0)
    left, right = random_orthogonal(3, g), random_orthogonal(5, g)
    x = torch.randn(4, 15, dtype=torch.float64, generator=g)
    rotation = OnlineRotation(left, right)
    assert torch.allclose(rotation(x), x @ torch.kron(left, right), atol=1e-12)
    assert torch.equal(rotation.dense(), torch.kron(left, right))


def test_blocks_are_block_diagonal():
    g = torch.Generator().manual_seed(0)
    left, right = random_orthogonal(2, g), random_orthogonal(3, g)
    rotation = OnlineRotation(left, right, blocks=4)
    x = torch.randn(5, 24, dtype=torch.float64, generator=g)
    dense = torch.block_diag(*[torch.kron(left, right)] * 4)
    assert torch.allclose(rotation(x), x @ dense, atol=1e-12)
    assert torch.equal(rotation.dense(), dense)
    assert rotation.width == 24


def test_the_cut_is_the_cheapest():
    rotation = hadamard_rotation(1536)
    assert (rotation.left.shape[0], rotation.right.shape[0]) == (48, 32)


def test_a_matrix_that_is_not_orthogonal_is_refused():
    with pytest.raises(ResultError, match="not orthogonal"):
        OnlineRotation(torch.eye(2), torch.ones(3, 3))


@pytest.mark.parametrize("n", [64, 128, 1536, 11008])
def test_sixteen_bit_inputs_lose_no_length(n):
    """The entries of a 16-bit Hadamard matrix are all off one way; its signs are not."""
    x = torch.randn(64, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = hadamard_rotation(n)(x).double()
    exact = hadamard_rotation(n)(x.double())
    assert (found * exact).sum() / exact.square().sum() == pytest.approx(1, abs=2e-4)
    assert (found - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize("n", [64, 1536])  # by one product, by two
def test_a_weight_that_nobody_keeps_is_there_twice_at_most(n):
    rotation, size = hadamard_rotation(n), 96 * n * 8
    with Live() as live:
        rotation.of_weight(torch.zeros(96, n, dtype=torch.float64))
    factors = 8 * (rotation.left.numel() + rotation.right.numel())
    assert 2 * size <= live.peak <= 2 * size + 2 * factors
