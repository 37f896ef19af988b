import numpy as np
import pytest
import scipy.linalg
import torch

from spinlab.errors import InputError
from spinlab.rotation.hadamard import hadamard_factors, hadamard_matrix


@pytest.mark.parametrize("n", [1, 2, 4, 64, 256])
def test_powers_of_two_are_scipys_sylvester_matrices(n):
    assert np.array_equal(hadamard_matrix(n).numpy(), scipy.linalg.hadamard(n))


# Paley I over GF(11), GF(27), Paley II over GF(17), GF(49), Kronecker, and the widths of SmolLM2
@pytest.mark.parametrize("n", [12, 28, 36, 100, 144, 172 * 2, 576, 684, 924, 1536])
def test_every_order_has_orthogonal_rows_of_signs(n):
    h = hadamard_matrix(n).double()
    assert set(h.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def test_only_eleven_orders_up_to_300_are_missing():
    missing = []
    for n in range(4, 301, 4):
        try:
            hadamard_factors(n)
        except InputError:
            missing.append(n)
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]


@pytest.mark.parametrize(
    ("n", "factors"), [(576, (36, 16)), (1536, (12, 128)), (11008, (344, 32)), (29568, (924, 32))]
)
def test_widths_of_real_models_split_into_core_and_power_of_two(n, factors):
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", [13696, 3, 7, 6, 0])
def test_a_width_without_an_order_is_named_with_a_way_out(n):
    with pytest.raises(InputError, match=f"width {n}"):
        hadamard_factors(n)
