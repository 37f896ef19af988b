import itertools

import pytest
import torch

from spinlab.config import TensorQuant, WeightsConfig
from spinlab.quant.affine import Grid, decode
from spinlab.weights.gptq import Hessian, gptq
from spinlab.weights.rtn import rtn

SYMMETRIC = TensorQuant(symmetric=True)


def correlated_inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(rows, width, generator=g) @ mix


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    gathered = Hessian(x.shape[1], x.device)
    for part in x.split(7):
        gathered.add(part)
    return gathered.value()


def output_error(weight: torch.Tensor, found, x: torch.Tensor) -> float:
    return (x @ (found.dequantize() - weight).T).square().sum().item()


def test_the_hessian_is_the_second_moment_of_the_inputs():
    x = correlated_inputs(20, 5)
    assert torch.allclose(hessian_of(x), 2 * x.T @ x / 20, rtol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", [SYMMETRIC, TensorQuant(), TensorQuant(group_size=16)], ids=str)
def test_gptq_beats_rtn_on_correlated_inputs(format, act_order):
    x = correlated_inputs(256, 64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    config = WeightsConfig(block_size=24, act_order=act_order)
    found = gptq(weight, hessian_of(x), format, config)
    assert output_error(weight, found, x) < 0.6 * output_error(
        weight, rtn(weight, format, config), x
    )


def test_gptq_is_rtn_where_inputs_are_uncorrelated():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = gptq(weight, torch.eye(16), SYMMETRIC, WeightsConfig())
    assert torch.equal(found.levels, rtn(weight, SYMMETRIC, WeightsConfig()).levels)


def test_gptq_equals_the_brute_force_optimum_on_a_tiny_case():
    """Of all 512 level triples of every row none changes the outputs less, where RTN's do more."""
    x = torch.tensor([[0.5, 0.9, -0.2], [1.0, 1.8, -1.0], [-1.3, -1.1, 0.8]])
    weight = torch.tensor([[0.39, -0.22, -0.32], [-1.21, 1.04, -0.63], [0.57, 0.54, -0.39]])
    format = TensorQuant(bits=3, symmetric=True)
    config = WeightsConfig(percdamp=1e-9, clip_search=False)
    found, nearest = gptq(weight, hessian_of(x), format, config), rtn(weight, format, config)
    rtn_was_worse = 0
    for row in range(3):
        scale, zero = found.scale[row], found.zero[row]
        errors = {}
        for triple in itertools.product(range(-4, 4), repeat=3):
            dense = decode(torch.tensor(triple, dtype=torch.float32), scale, zero, Grid(3, True))
            errors[triple] = (x @ (dense - weight[row])).square().sum().item()
        best = min(errors.values())
        assert errors[tuple(found.levels[row].tolist())] == pytest.approx(best, rel=1e-5)
        rtn_was_worse += errors[tuple(nearest.levels[row].tolist())] > 1.01 * best
    assert rtn_was_worse == 2


def test_gptq_follows_the_textbook_update():
    """The definition, column by column with an explicit inverse of the remaining Hessian
    (Frantar et al. 2022, eq. 2 and 3), in float64."""
    x = correlated_inputs(64, 10)
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
    config = WeightsConfig(block_size=3, percdamp=0.01, clip_search=False)
    h = hessian_of(x)
    found = gptq(weight, h, SYMMETRIC, config)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(10)
    w = weight.double().clone()
    for j in range(10):
        inverse = torch.linalg.inv(damped[j:, j:])
        scale = found.scale[:, 0].double()
        q = torch.clamp(torch.round(w[:, j] / scale), -8, 7)
        assert torch.equal(q, found.levels[:, j].double())
        error = (w[:, j] - q * scale) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0][None]


def test_columns_without_input_become_zero():
    x = correlated_inputs(64, 8)
    x[:, 3] = 0
    found = gptq(torch.randn(4, 8), hessian_of(x), SYMMETRIC, WeightsConfig())
    assert (found.dequantize()[:, 3] == 0).all()
