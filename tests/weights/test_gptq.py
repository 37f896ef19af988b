"""GPTQ against the textbook, brute force and RTN."""

import itertools

import pytest
import torch

from spinlab.config import ClipSearch, GPTQConfig, TensorQuant, WeightsConfig
from spinlab.errors import InputError, ResultError
from spinlab.formats import IntegerFormat, Parameters
from spinlab.weights.gptq import Moment, error_spread, gptq
from spinlab.weights.rtn import rtn
from tests.live import Live

SYMMETRIC = TensorQuant(symmetric=True)


def correlated_inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(rows, width, generator=g) @ mix


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    gathered = Moment(x.shape[1], x.device)
    for part in x.split(7):
        gathered.add(part, part)
    return gathered.value()


def gptq_settings(clip_search: bool = True, **changes) -> WeightsConfig:
    return WeightsConfig("gptq", ClipSearch(search=clip_search), GPTQConfig(**changes))


def gptq_of(weight, hessian, format, config):
    return gptq(weight, error_spread(hessian, config.gptq), format, config)


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
    config = gptq_settings(block_size=24, act_order=act_order, static_groups=act_order)
    found = gptq_of(weight, hessian_of(x), format, config)
    assert output_error(weight, found, x) < 0.6 * output_error(
        weight, rtn(weight, format, config.clip), x
    )


def test_gptq_is_rtn_where_inputs_are_uncorrelated():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = gptq_of(weight, torch.eye(16), SYMMETRIC, gptq_settings())
    assert torch.equal(found.levels, rtn(weight, SYMMETRIC, ClipSearch()).levels)


def test_gptq_equals_the_brute_force_optimum_on_a_tiny_case():
    """Of all 512 level triples of every row none changes the outputs less, where RTN's do more."""
    x = torch.tensor([[0.5, 0.9, -0.2], [1.0, 1.8, -1.0], [-1.3, -1.1, 0.8]])
    weight = torch.tensor([[0.39, -0.22, -0.32], [-1.21, 1.04, -0.63], [0.57, 0.54, -0.39]])
    format = TensorQuant(bits=3, symmetric=True)
    config = gptq_settings(percdamp=1e-9, clip_search=False)
    found, nearest = (
        gptq_of(weight, hessian_of(x), format, config),
        rtn(weight, format, config.clip),
    )
    rtn_was_worse = 0
    for row in range(3):
        scale, zero = found.scale[row], found.zero[row]
        errors = {}
        for triple in itertools.product(range(-4, 4), repeat=3):
            levels = torch.tensor(triple, dtype=torch.float32)
            dense = IntegerFormat(3, True).decode(levels, Parameters(scale, zero))
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
    config = gptq_settings(block_size=3, percdamp=0.01, clip_search=False)
    h = hessian_of(x)
    found = gptq_of(weight, h, SYMMETRIC, config)
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
    found = gptq_of(torch.randn(4, 8), hessian_of(x), SYMMETRIC, gptq_settings())
    assert (found.dequantize()[:, 3] == 0).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_groups_keep_the_ranges_of_rtn(symmetric, act_order):
    x = correlated_inputs(64, 32)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    format = TensorQuant(symmetric=symmetric, group_size=8)
    static = gptq_settings(static_groups=True, act_order=act_order, block_size=12)
    found, nearest = (
        gptq_of(weight, hessian_of(x), format, static),
        rtn(weight, format, static.clip),
    )
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero, nearest.zero)
    assert not torch.equal(found.levels, nearest.levels)
    live = gptq_of(weight, hessian_of(x), format, gptq_settings(block_size=12))
    assert torch.equal(live.scale[:, 0], nearest.scale[:, 0])
    assert not torch.equal(live.scale[:, 1:], nearest.scale[:, 1:])


def test_ranges_of_groups_do_not_depend_on_how_columns_are_blocked():
    """A group may reach beyond its block, whose columns are updated late."""
    x = correlated_inputs(128, 48)
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(4))
    format = TensorQuant(group_size=16)
    found = [gptq_of(weight, hessian_of(x), format, gptq_settings(block_size=b)) for b in (48, 10)]
    assert torch.allclose(found[0].scale, found[1].scale, rtol=1e-5)
    assert (found[0].levels == found[1].levels).float().mean() > 0.999


@pytest.mark.parametrize("group_size", [0, 16])
def test_a_stack_of_weights_is_rounded_as_each_alone(group_size):
    x = correlated_inputs(256, 64)
    weights = torch.randn(96, 64, generator=torch.Generator().manual_seed(5)).split([48, 16, 32])
    format, config = TensorQuant(group_size=group_size), gptq_settings(block_size=24)
    spread = error_spread(hessian_of(x), config.gptq)
    stacked = gptq(torch.cat(weights), spread, format, config).split([48, 16, 32])
    for weight, found in zip(weights, stacked, strict=True):
        alone = gptq(weight, spread, format, config)
        assert torch.allclose(found.scale, alone.scale, rtol=1e-5)
        assert (found.levels == alone.levels).float().mean() > 0.999


def test_the_spread_is_the_factor_of_the_damped_inverse():
    h = hessian_of(correlated_inputs(256, 24))
    config = gptq_settings(act_order=True)
    spread = error_spread(h, config.gptq)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(24)
    inverse = torch.linalg.inv(damped[spread.order][:, spread.order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    expected = factor / factor.diagonal()[:, None]
    assert torch.allclose(spread.rows.double(), expected, atol=1e-6 * expected.abs().max().item())


def test_a_hessian_that_cannot_be_factored_names_the_setting_to_raise():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(InputError, match=r"weights.gptq.percdamp=0.01: raise it"):
        error_spread(indefinite, GPTQConfig())
    with pytest.raises(ResultError, match="4 of 4 numbers that are nan"):
        error_spread(torch.full((2, 2), torch.nan), GPTQConfig())


@pytest.mark.parametrize("format", [SYMMETRIC, TensorQuant(group_size=16)], ids=str)
def test_act_order_is_plain_gptq_on_columns_by_falling_diagonal(format):
    x = correlated_inputs(256, 64) * torch.rand(64, generator=torch.Generator().manual_seed(3))
    weight, hessian = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), hessian_of(x)
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    assert not torch.equal(order, order.sort().values)
    plain = gptq_settings(static_groups=True, clip_search=False)
    config = gptq_settings(act_order=True, static_groups=True, clip_search=False)
    found = gptq(weight, error_spread(hessian, config.gptq), format, config)
    if format.group_size:  # groups are runs of columns as they stood, so only the order can be seen
        still = gptq(weight, error_spread(hessian, plain.gptq), format, plain)
        assert torch.equal(found.scale, still.scale)
        assert not torch.equal(found.levels, still.levels)
        return
    turned = error_spread(hessian[order][:, order], plain.gptq)
    expected = gptq(weight[:, order], turned, format, plain)
    assert torch.equal(found.levels[:, order], expected.levels)


def test_a_hessian_that_nobody_keeps_is_gone_while_it_is_factored():
    x, size = torch.randn(512, 256), 256**2
    with Live() as live:
        error_spread(x.T @ x, GPTQConfig())
    assert 2 * 8 * size <= live.peak <= 2 * 8 * size + x.nbytes + 2**16
