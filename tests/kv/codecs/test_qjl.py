"""QJL's estimate of products: unbiased, of the variance of theory, less with orthogonal rows."""

import math

import pytest
import torch

from spinlab.config import CodecConfig, QJLConfig
from spinlab.errors import InputError
from spinlab.kv.codecs import make_codec
from spinlab.kv.sketch import draw_sketch

PAIRS, SKETCHES = 100, 100  # of every sketch, and how many: 10 000 pairs


def qjl(bits=2, width=64, run=32, **own):
    settings = CodecConfig(bits=bits, codec="qjl", run=run, qjl=QJLConfig(**own))
    return make_codec("kv.keys", settings, width, 0)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def errors(orthogonal, count, width=64):
    """Return errors of products (sketches, pairs) of vectors that have much in common."""
    k, noise = (vectors(SKETCHES, PAIRS, width, seed=n) for n in (1, 2))
    k, q = k / k.norm(dim=-1, keepdim=True), k + noise
    generator, found = torch.Generator().manual_seed(3), []
    for keys, queries in zip(k, q, strict=True):
        sketch = draw_sketch(count, width, orthogonal, generator)
        estimate = sketch.direction(sketch.signs(keys), keys)
        found.append((queries * (estimate - keys)).sum(-1))
    variance = (math.pi / 2 * q.square().sum(-1) - (q * k).sum(-1).square()) / count
    return torch.stack(found), variance


@pytest.mark.parametrize("count", [64, 128])
def test_the_estimate_is_unbiased_and_of_the_variance_that_theory_has(count):
    """Var = (pi/2 |q|²|k|² - <q,k>²)/m for independent rows; orthogonal ones stay below it."""
    found, variance = errors(False, count)
    together, _ = errors(True, count)
    for case in (found, together):
        of_sketches = case.mean(1)  # pairs share theirs
        assert of_sketches.mean().abs() < 3 * of_sketches.std() / SKETCHES**0.5
    assert found.square().mean().item() == pytest.approx(variance.mean().item(), rel=0.05)
    assert together.square().mean() < 0.8 * found.square().mean()


def test_the_formula_holds_as_it_is_printed():
    """sqrt(pi/2)/m · |k| · <Sq, sign(Sk)>, of independent rows (sec. 3, definition 3.1)."""
    made = qjl(3, 16, orthogonal=False)
    k, q, rows = vectors(20, 16), vectors(20, 16, seed=1), made.sketch.rows.like(vectors(1))
    m = len(rows)
    sums = ((q @ rows.mT) * (k @ rows.mT).sign()).sum(-1)
    printed = math.sqrt(math.pi / 2) / m * k.norm(dim=-1) * sums
    assert m == 48 and torch.allclose((q * made.round(k)).sum(-1), printed, rtol=1e-3)


@pytest.mark.parametrize("count", [16, 48])
def test_rows_are_orthogonal_as_many_as_a_head_is_wide(count):
    rows = draw_sketch(count, 16, True, torch.Generator().manual_seed(0)).rows.like(vectors(1))
    for block in rows.split(16):
        assert torch.allclose(block @ block.mT, 16 * torch.eye(16).double(), atol=1e-12)


def test_large_channels_apart_spare_the_others_their_noise():
    """Four channels are 20 times as large; they are found run by run, and named in the row."""
    k = vectors(3, 2, 64, 64)
    k[..., :32, [3, 9, 40, 63]] *= 20
    k[..., 32:, [0, 1, 2, 4]] *= 20
    small = torch.ones(2, 32, 64, dtype=torch.bool)
    small[0][:, [3, 9, 40, 63]] = False
    small[1][:, [0, 1, 2, 4]] = False
    apart, together = qjl(outliers=4), qjl()
    rows = apart.encode(k)
    assert rows[0, 0, 0, -4:].tolist() == [3, 9, 40, 63]
    assert rows[2, 1, 1, -4:].tolist() == [0, 1, 2, 4]
    error = [(c.round(k) - k)[..., small.flatten(0, 1)].norm() for c in (apart, together)]
    assert error[0] < 0.2 * error[1]


def test_bits_count_signs_norms_and_names():
    assert qjl(2, 128).bits == 2 + 16 / 128
    # signs, those of the outliers, two norms, 8 names per 32 tokens: 4.27 (and not 3)
    made = qjl(2, 128, outliers=8, outlier_bits=2)
    assert made.bits == 2 + 2 + 32 / 128 + 8 * 8 / 32 / 128
    assert made.row_bytes == 32 * (32 + 2 + 32 + 2) + 8


@pytest.mark.parametrize("width", [6, 80, 96])
def test_heads_of_any_width_are_taken(width):
    for made in (qjl(1, width), qjl(2, width, outliers=2)):
        x = vectors(2, 32, width)
        assert made.round(x).shape == x.shape and made.encode(x).shape[-1] == made.row_bytes


def test_more_outliers_than_channels_are_refused():
    with pytest.raises(InputError, match=r"kv.keys.qjl.outliers=16 of heads of 16 numbers"):
        qjl(2, 16, outliers=16)
