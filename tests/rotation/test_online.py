import pytest
import torch

from spinlab.rotation.hadamard import hadamard_matrix
from spinlab.rotation.online import OnlineRotation, hadamard_rotation, online_rotation


@pytest.mark.parametrize("n", [8, 20, 36, 64, 576, 1536])
def test_two_small_products_are_the_dense_hadamard(n):
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = hadamard_matrix(n).double() / n**0.5
    assert torch.allclose(hadamard_rotation(n)(x), x @ dense, atol=1e-12)


def test_an_unsymmetric_kronecker_product_acts_from_the_right():
    g = torch.Generator().manual_seed(0)
    left = online_rotation("random", 3, g).right
    right = online_rotation("random", 5, g).right
    x = torch.randn(4, 15, dtype=torch.float64, generator=g)
    rotation = OnlineRotation(left, right)
    assert torch.allclose(rotation(x), x @ torch.kron(left, right), atol=1e-12)
    assert torch.equal(rotation.dense(), torch.kron(left, right))


def test_the_cut_is_the_cheapest():
    rotation = hadamard_rotation(1536)
    assert (rotation.left.shape[0], rotation.right.shape[0]) == (48, 32)


def test_none_and_identity_are_no_online_rotation():
    g = torch.Generator()
    assert online_rotation("none", 8, g) is None
    assert online_rotation("identity", 8, g) is None


def test_a_matrix_that_is_not_orthogonal_is_refused():
    with pytest.raises(AssertionError, match="not orthogonal"):
        OnlineRotation(torch.eye(2), torch.ones(3, 3))
