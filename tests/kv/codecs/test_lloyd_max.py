"""Lloyd-Max levels of rotated heads: the published codebooks, distortions and estimates."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

from spinlab.config import CodecConfig, LloydMaxConfig
from spinlab.errors import InputError
from spinlab.kv.codecs import make_codec
from spinlab.kv.codecs.lloyd_max import lloyd_max_levels

# arXiv 2504.19874: positive levels times sqrt(d), and the distortion of a vector of norm 1
LEVELS = {
    (128, 1): [0.7994],
    (128, 2): [0.4525, 1.5052],
    (128, 3): [0.2444, 0.7533, 1.3366, 2.1315],
    (128, 4): [0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889],
    (64, 1): [0.8010],
    (64, 2): [0.4521, 1.5000],
    (64, 3): [0.2438, 0.7507, 1.3293, 2.1113],
    (64, 4): [0.1274, 0.3847, 0.6505, 0.9319, 1.2394, 1.5908, 2.0233, 2.6464],
}
DISTORTIONS = {
    128: [0.3609, 0.1160, 0.0340, 0.00931],
    64: [0.3584, 0.1145, 0.0334, 0.00913],
}


def codec(bits=4, width=128, seed=0, **own):
    settings = CodecConfig(bits=bits, codec="lloyd_max", lloyd_max=LloydMaxConfig(**own))
    return make_codec("kv.keys", settings, width, seed)


def heads(n=4000, width=128, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()


def density(width):
    log = special.gammaln(width / 2) - special.gammaln((width - 1) / 2) - math.log(math.pi) / 2
    return lambda x: math.exp(log) * (1 - x * x) ** ((width - 3) / 2)


@pytest.mark.parametrize(("width", "bits"), LEVELS, ids=str)
def test_levels_are_the_published_ones_and_best_for_the_density(width, bits):
    """Oracle: scipy's integrals. Every level is the mean of its cell, which ends midway."""
    levels = lloyd_max_levels(width, bits)
    half = levels[len(levels) // 2 :]
    assert half * width**0.5 == pytest.approx(LEVELS[width, bits], abs=6e-5)
    assert np.array_equal(levels, -levels[::-1])
    f, ends = density(width), [0, *(half[1:] + half[:-1]) / 2, 1]
    distortion = 0.0
    for level, low, high in zip(half, ends, ends[1:], strict=False):
        high = min(high, low + 20 / width**0.5)  # nothing lies beyond
        mass, mean, error = (
            integrate.quad(lambda x, g=g: g(x) * f(x), low, high, epsabs=1e-13)[0]
            for g in (lambda x: 1, lambda x: x, lambda x, level=level: (x - level) ** 2)
        )
        assert level == pytest.approx(mean / mass, rel=1e-8)
        distortion += 2 * width * error
    published = DISTORTIONS[width][bits - 1]
    assert f"{distortion:.3g}" == f"{published:.3g}"
    if bits > 1:
        assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("width", [3, 40, 128])
def test_each_of_many_levels_is_the_mean_of_its_cell_too(width):
    levels = lloyd_max_levels(width, 8)
    f, ends = density(width), [-1, *(levels[1:] + levels[:-1]) / 2, 1]
    for level, low, high in zip(levels[128:], ends[128:-1], ends[129:], strict=True):
        high = min(high, low + 20 / width**0.5)  # nothing lies beyond
        mass, mean = (
            integrate.quad(lambda x, n=n: x**n * f(x), low, high, epsabs=0)[0] for n in (0, 1)
        )
        assert level == pytest.approx(mean / mass, rel=1e-8)


@pytest.mark.parametrize("width", DISTORTIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_is_coded_has_that_distortion(width, bits):
    x = heads(width=width)
    error = (codec(bits, width).round(x) - x).square().sum(-1) / x.square().sum(-1)
    standard_error = error.std().item() / len(x) ** 0.5
    assert error.mean().item() == pytest.approx(
        DISTORTIONS[width][bits - 1], abs=3 * standard_error
    )


def test_lengths_are_what_their_names_say():
    """Of the found vector: its norm, its distance, its product with the exact one."""
    x = heads()
    found = {n: codec(2, length=n).round(x) for n in ("plain", "norm", "least_squares", "eden")}
    errors = {name: (y - x).norm().item() for name, y in found.items()}
    assert min(errors, key=errors.__getitem__) == "least_squares"
    assert torch.allclose(found["norm"].norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    assert torch.allclose((found["eden"] * x).sum(-1), x.square().sum(-1), rtol=1e-3)
    for y in found.values():  # they differ in nothing else
        cosine = torch.cosine_similarity(y, found["plain"], dim=-1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)


def test_the_sign_of_what_is_left_takes_the_bias_of_products_away():
    """Over sketches and pairs: q is near x, so that a wrong factor shows."""
    x, noise = heads(200, 64), heads(200, 64, seed=1)
    q = x + 2 * noise
    exact, errors = (q * x).sum(-1), {False: [], True: []}
    for seed in range(50):
        for residual, found in errors.items():
            y = codec(2, 64, seed, residual=residual).round(x)
            found.append(((q * y).sum(-1) - exact) / x.square().sum(-1))
    biased, unbiased = (torch.stack(errors[residual]) for residual in (False, True))
    standard_error = unbiased.std() / unbiased.numel() ** 0.5
    assert unbiased.mean().abs() < 3 * standard_error
    assert biased.mean() < -20 * standard_error
    assert unbiased.std() > biased.std()


@pytest.mark.parametrize("turn", ["none", "hadamard"])
def test_zeros_that_float_noise_makes_are_one_number(turn):
    """Few channels, turned by a Hadamard matrix, leave exact zeros where two cells meet."""
    made = codec(3, 64, turn=turn)
    x = torch.zeros(1, 64).double()
    x[0, 1:9] = 1.0
    other = x + 1e-13 * heads(500, 64)
    assert torch.equal(made.encode(x).expand(500, -1), made.encode(other))


def test_bits_count_what_a_row_holds():
    assert codec(4).bits == 4 + 16 / 128
    assert codec(3, 64).bits == 3 + 16 / 64
    assert codec(3, residual=True).bits == 3 + 32 / 128


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e4, 1e30])
def test_extreme_magnitudes_stay_finite(size):
    for own in ({}, {"length": "eden"}, {"length": "norm", "residual": True}):
        assert codec(3, **own).round(size * heads(10).float()).isfinite().all()


@pytest.mark.parametrize(
    ("bits", "own", "words"),
    [(9, {}, "codes 1 to 8"), (1, {"residual": True}, "codes 2 to 8 bits, one of them for")],
)
def test_bits_that_there_are_not_are_refused(bits, own, words):
    with pytest.raises(InputError, match=words):
        codec(bits, **own)
