"""Hadamard matrices of every order against scipy and H Hᵀ = n I."""

import numpy as np
import pytest
import scipy.linalg
import torch

from spinlab.errors import InputError
from spinlab.rotation.hadamard import hadamard_block, hadamard_factors, hadamard_matrix


@pytest.mark.parametrize("n", [1, 2, 4, 64, 256])
def test_powers_of_two_are_scipys_sylvester_matrices(n):
    assert np.array_equal(hadamard_matrix(n).numpy(), scipy.linalg.hadamard(n))


# Paley I over GF(11), GF(27), Paley II over GF(17), GF(49), Kronecker, and the widths of SmolLM2
@pytest.mark.parametrize("n", [12, 28, 36, 100, 144, 172 * 2, 576, 684, 924, 1536])
def test_every_order_has_orthogonal_rows_of_signs(n):
    assert_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize("n", [92, 116, 156, 172, 260, 292])
def test_circulants_give_the_orders_that_paley_misses(n):
    assert hadamard_factors(n)[0] == n
    assert_hadamard(hadamard_matrix(n))


def assert_hadamard(matrix):
    n, h = len(matrix), matrix.double()
    assert set(h.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


def test_only_three_orders_up_to_300_are_missing():
    missing = []
    for n in range(4, 301, 4):
        try:
            hadamard_factors(n)
        except InputError:
            missing.append(n)
    assert missing == [188, 236, 268]


@pytest.mark.parametrize(
    ("n", "factors"), [(576, (36, 16)), (1536, (12, 128)), (11008, (172, 64)), (29568, (924, 32))]
)
def test_widths_of_real_models_split_into_core_and_power_of_two(n, factors):
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", [13696, 3, 7, 6, 0])
def test_a_width_without_an_order_is_named_with_a_way_out(n):
    with pytest.raises(InputError, match=f"width {n}"):
        hadamard_factors(n)


# hidden, intermediate and head widths; the heads of SmolLM2-135M and Qwen2.5-0.5B have no order
WIDTHS = {
    "llama-1/2 7b": (4096, 11008, 128),
    "llama-1/2 13b": (5120, 13824, 128),
    "llama-1 30b": (6656, 17920, 128),
    "llama-1 65b": (8192, 22016, 128),
    "llama-2/3 70b": (8192, 28672, 128),
    "llama-3 8b, mistral 7b": (4096, 14336, 128),
    "llama-3.2 1b": (2048, 8192, 64),
    "llama-3.2 3b": (3072, 8192, 128),
    "qwen2.5 0.5b": (896, 4864, 64),
    "qwen2.5 1.5b": (1536, 8960, 128),
    "qwen2.5 3b": (2048, 11008, 128),
    "qwen2.5 7b": (3584, 18944, 128),
    "qwen2.5 14b": (5120, 13824, 128),
    "qwen2.5 32b": (5120, 27648, 128),
    "qwen2.5 72b": (8192, 29568, 128),
    "qwen3 0.6b": (1024, 3072, 128),
    "qwen3 4b": (2560, 9728, 128),
    "qwen3 8b": (4096, 12288, 128),
    "qwen3 14b": (5120, 17408, 128),
    "qwen3 32b": (5120, 25600, 128),
    "phi-3 mini": (3072, 8192, 96),
    "phi-3 medium": (5120, 17920, 128),
    "smollm2 135m": (576, 1536, 64),
    "smollm2 360m": (960, 2560, 64),
    "smollm2 1.7b": (2048, 8192, 64),
    "tinyllama 1.1b": (2048, 5632, 64),
}


@pytest.mark.parametrize("width", sorted({w for widths in WIDTHS.values() for w in widths}))
def test_every_width_of_the_supported_models_has_a_full_order(width):
    core, power = hadamard_factors(width)
    assert core * power == width
    h = hadamard_matrix(core).double() if core > 1 else torch.ones(1, 1, dtype=torch.float64)
    assert torch.equal(h @ h.T, core * torch.eye(core, dtype=torch.float64))
    assert hadamard_block(width, "r4") == width


@pytest.mark.parametrize(("width", "block"), [(13696, 128), (45, 1), (4 * 47, 4), (2 * 9, 2)])
def test_other_widths_get_the_largest_blocks_there_are_and_say_so(caplog, width, block):
    assert hadamard_block(width, "r4") == block
    assert f"no Hadamard matrix of order {width}" in caplog.text
