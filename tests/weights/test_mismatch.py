"""GPTAQ and Qronos against their papers' formulations, brute force, and GPTQ."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from spinlab.config import ClipSearch, GPTAQConfig, TensorQuant, WeightsConfig
from spinlab.errors import InputError, ResultError
from spinlab.formats import IntegerFormat, Parameters
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.weights.gptq import Moment, gptq
from spinlab.weights.mismatch import Mismatch, gptaq, looking_ahead, mismatch, qronos
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import round_to_nearest, rtn

SYMMETRIC = TensorQuant(symmetric=True)
METHODS = {"gptaq": gptaq, "qronos": qronos}
Rows = tuple[torch.Tensor, torch.Tensor]


def inputs(rows: int, width: int, seed: int = 0, noise: float = 0.2) -> Rows:
    """Return the original's correlated inputs, and those of a network that is off and rounds."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -1, width)[:, None]
    exact = torch.randn(rows, width, generator=g) @ mix
    off = exact @ (torch.eye(width) + noise * torch.randn(width, width, generator=g) / width**0.5)
    return exact, TokenQuantizer(IntegerFormat(4, False)).round(off)


def weights(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed + 50))


def moments(exact: torch.Tensor, x: torch.Tensor) -> Rows:
    """Return H and D, gathered in parts of different sizes."""
    found = Moment(x.shape[1], x.device), Moment(x.shape[1], x.device)
    for off, part in zip((exact - x).split(7), x.split(7), strict=True):
        found[0].add(part, part)
        found[1].add(off, part)
    return found[0].value(), found[1].value()


def settings(search: bool = True, strength: float = 1.0, **changes) -> WeightsConfig:
    """Both methods at the strength of their papers, unless another is asked for."""
    gptaq = GPTAQConfig(strength=strength, **changes)
    return WeightsConfig("gptaq", ClipSearch(search=search), gptaq=gptaq)


def known(rows: Rows, config: WeightsConfig) -> Mismatch:
    return mismatch(*moments(*rows), config.gptaq)


def objective(found: QuantizedWeight, weight: torch.Tensor, rows: Rows) -> float:
    """Return ‖X Qᵀ - X̃ Wᵀ‖² of rows X̃ and X."""
    exact, x = rows
    return (x @ found.dequantize().T - exact @ weight.T).square().sum().item()


def stacked(x: torch.Tensor, damping: float) -> np.ndarray:
    """Return rows whose normal equations are those of x, scaled as H is, with H's damping."""
    x = x.double().numpy() * (2 / len(x)) ** 0.5
    return np.concatenate((x, damping**0.5 * np.eye(x.shape[1])))


def damping_of(x: torch.Tensor, config: WeightsConfig) -> float:
    return config.gptaq.percdamp * 2 * x.double().square().mean().item()


def level(number: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.round(number / scale), -8, 7)


@pytest.mark.parametrize("act_order", [False, True])
def test_p_is_its_definition_row_by_row(act_order):
    """Eq. 16: D's row, over the columns after it, times the inverse of their damped Hessian."""
    config = settings(act_order=act_order)
    h, d = (moment.double() for moment in moments(*inputs(300, 24)))
    found = mismatch(h.float(), d.float(), config.gptaq)
    order = found.spread.order
    h = (h + config.gptaq.percdamp * h.diagonal().mean() * torch.eye(24))[order][:, order]
    d, expected = d[order][:, order], torch.zeros(24, 24, dtype=torch.float64)
    for q in range(23):
        expected[q, q + 1 :] = d[q, q + 1 :] @ torch.linalg.inv(h[q + 1 :, q + 1 :])
    assert torch.allclose(looking_ahead(found).double(), expected, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("block_size", [3, 10])
def test_gptaq_solves_eq_14_for_one_column_after_another(block_size):
    """Least squares in float64 on the inputs themselves, with damping as further rows."""
    exact, x = inputs(64, 10)
    weight, config = weights(4, 10), settings(search=False, block_size=block_size)
    found = gptaq(weight, known((exact, x), config), SYMMETRIC, config)
    seen = stacked(x, damping_of(x, config))
    lack = stacked(exact, 0) - stacked(x, 0)
    w, scale = weight.double().numpy().copy(), found.scale[:, 0].double().numpy()
    for q in range(10):
        levels = level(w[:, q], scale)
        assert np.array_equal(levels, found.levels[:, q].numpy()), q
        error = levels * scale - w[:, q]
        # the damping holds the later columns alone: the column itself is settled
        only = seen[:, q] * (np.arange(len(seen)) < len(x))
        target = np.outer(lack[:, q], w[:, q]) - np.outer(only, error)
        w[:, q + 1 :] += np.linalg.lstsq(seen[:, q + 1 :], target, rcond=None)[0].T


def test_qronos_alternates_between_correction_and_diffusion():
    """The paper's own form: each weight is rounded where it corrects best while the others stay,
    then the later ones are least squares; on the inputs themselves, in float64, at no damping."""
    exact, x = inputs(64, 10)
    weight, config = weights(4, 10), settings(search=False, percdamp=1e-9)
    ratios = torch.ones(4, 1, 1)
    found = qronos(weight, known((exact, x), config), SYMMETRIC, config, ratios)
    seen, w = x.double().numpy(), weight.double().numpy().copy()
    target, scale = exact.double().numpy() @ w.T, found.scale[:, 0].double().numpy()
    for q in range(10):
        others = target - np.delete(seen, q, 1) @ np.delete(w, q, 1).T
        levels = level(seen[:, q] @ others / (seen[:, q] @ seen[:, q]), scale)
        assert np.array_equal(levels, found.levels[:, q].numpy()), q
        w[:, q] = levels * scale
        rest = target - seen[:, : q + 1] @ w[:, : q + 1].T
        w[:, q + 1 :] = np.linalg.lstsq(seen[:, q + 1 :], rest, rcond=None)[0].T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("format", "changes"),
    [
        (SYMMETRIC, {"block_size": 10}),
        (TensorQuant(bits=3), {"act_order": True}),
        (TensorQuant(group_size=8), {"block_size": 12}),
        (TensorQuant(group_size=8), {"static_groups": True, "act_order": True}),
    ],
    ids=str,
)
def test_with_the_originals_own_inputs_it_is_gptq_bit_for_bit(method, format, changes):
    _, x = inputs(80, 32)
    x[:, 5] = 0
    weight, config = weights(6, 32), settings(**changes)
    found = known((x, x), config)
    expected = gptq(weight, found.spread, format, config)
    ours = METHODS[method](weight, found, format, config)
    for name in ("levels", "scale", "zero"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@pytest.mark.parametrize("method", METHODS)
def test_between_brute_force_and_rounding_to_nearest(method):
    """All levels of four 3-bit weights are tried; the ranges are given, and the same."""
    config, format = settings(percdamp=1e-6), TensorQuant(bits=3, symmetric=True)
    grid = torch.tensor(list(itertools.product(range(-4, 4), repeat=4)), dtype=torch.float32)
    ratios, sums = torch.full((3, 1, 1), 0.9), torch.zeros(3, dtype=torch.float64)
    for seed in range(10):
        exact, x = inputs(40, 4, seed)
        weight = weights(3, 4, seed)
        found = METHODS[method](weight, known((exact, x), config), format, config, ratios)
        nearest = round_to_nearest(weight, format, ratios)
        assert torch.equal(found.scale, nearest.scale)
        best = 0.0
        for row in range(3):
            dense = IntegerFormat(3, True).decode(grid, Parameters(found.scale[row], 0))  # pyright: ignore[reportArgumentType]
            off = x @ dense.T - (exact @ weight[row])[:, None]
            best += off.square().sum(0).min().item()
        errors = [objective(q, weight, (exact, x)) for q in (found, nearest)]
        assert best <= errors[0] * (1 + 1e-5)
        sums += torch.tensor([best, *errors])
    # GPTAQ leaves it to later columns to make up for an input; of four there are few
    assert sums[1] < (0.6 if method == "gptaq" else 0.25) * sums[2]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_samples_does_not_matter(method):
    exact, x = inputs(300, 24)
    weight, config = weights(16, 24), settings()
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = (
        METHODS[method](weight, known(rows, config), SYMMETRIC, config)
        for rows in ((exact, x), (exact[shuffled], x[shuffled]))
    )
    assert (first.levels == second.levels).float().mean() > 0.99
    assert objective(second, weight, (exact, x)) == pytest.approx(
        objective(first, weight, (exact, x)), rel=1e-3
    )


@pytest.mark.parametrize("seed", range(4))
def test_outputs_on_new_inputs_come_closer_to_the_originals_than_by_gptq(seed):
    """Two layers with a ramp between them, the first rounded, inputs of the second rounded too."""
    g, width = torch.Generator().manual_seed(seed), 32
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -1, width)[:, None]
    data = torch.randn(3000, width, generator=g) @ mix
    first, second = weights(width, width, seed), weights(width, width, seed + 9)
    rounded = rtn(first, TensorQuant(bits=3), ClipSearch()).dequantize()
    exact, off = torch.relu(data @ first.T), torch.relu(data @ rounded.T)
    rows = exact, TokenQuantizer(IntegerFormat(4, False)).round(off)
    seen, new = tuple(r[:2000] for r in rows), tuple(r[2000:] for r in rows)
    config = settings()
    found = known(seen, config)
    sweeps = (partial(gptq, spread=found.spread), partial(gptaq, found=found))
    sweeps += (partial(qronos, found=found),)
    by_gptq, by_gptaq, by_qronos = (
        objective(sweep(second, settings=SYMMETRIC, config=config), second, new) for sweep in sweeps
    )
    assert by_qronos < by_gptaq < 0.95 * by_gptq


@pytest.mark.parametrize("method", METHODS)
def test_a_column_that_only_the_original_has_is_made_up_for(method):
    """Channels that quantization sets to zero everywhere."""
    exact, x = inputs(400, 16)
    x[:, [0, 9]] = 0
    weight, config = weights(8, 16), settings()
    sweep = METHODS[method]
    found = sweep(weight, known((exact, x), config), SYMMETRIC, config)
    assert (found.dequantize()[:, [0, 9]] == 0).all()
    without = exact.clone()
    without[:, [0, 9]] = 0
    blind = sweep(weight, known((without, x), config), SYMMETRIC, config)
    errors = [objective(q, weight, (exact, x)) for q in (found, blind)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_groups_do_not_depend_on_how_columns_are_blocked(method):
    rows, weight = inputs(300, 48), weights(16, 48)
    format = TensorQuant(group_size=16)
    found = []
    for block in (48, 10):
        config = settings(block_size=block)
        found.append(METHODS[method](weight, known(rows, config), format, config))
    assert torch.allclose(found[0].scale, found[1].scale, rtol=1e-4)
    assert (found[0].levels == found[1].levels).float().mean() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_learned_ranges_stay_as_they_are(method):
    rows, weight, format = inputs(80, 16), weights(6, 16), TensorQuant(group_size=8)
    ratios = torch.linspace(0.5, 1, 12).view(6, 2, 1)
    found = METHODS[method](weight, known(rows, settings()), format, settings(), ratios)
    expected = round_to_nearest(weight, format, ratios)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
    assert not torch.equal(found.levels, expected.levels)


@pytest.mark.parametrize("method", METHODS)
def test_no_strength_is_gptq_and_half_of_it_is_towards_the_middle(method):
    (exact, x), weight = inputs(300, 24), weights(16, 24)
    sweep, found = METHODS[method], {}
    for strength in (0.0, 0.5, 1.0):
        config = settings(strength=strength)
        found[strength] = sweep(weight, known((exact, x), config), SYMMETRIC, config)
    spread = known((exact, x), settings()).spread
    assert torch.equal(found[0.0].levels, gptq(weight, spread, SYMMETRIC, settings()).levels)
    half = sweep(weight, known(((exact + x) / 2, x), settings()), SYMMETRIC, settings())
    assert (half.levels == found[0.5].levels).float().mean() > 0.99
    errors = [objective(found[s], weight, (exact, x)) for s in (1.0, 0.5, 0.0)]
    assert errors == sorted(errors)


def test_a_mismatch_that_is_not_finite_is_found():
    with pytest.raises(ResultError, match="the mismatch of inputs has 1 of 4 numbers"):
        mismatch(torch.eye(2), torch.tensor([[0, torch.nan], [0, 0]]), GPTAQConfig())


def test_a_strength_is_a_share():
    with pytest.raises(InputError, match=r"weights\.gptaq\.strength=1\.5 must lie in \[0, 1\]"):
        GPTAQConfig(strength=1.5)
