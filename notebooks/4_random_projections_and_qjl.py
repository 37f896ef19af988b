# %% [markdown]
# # Random projections and QJL
#
# A random matrix keeps lengths and inner products, roughly. That is why a random rotation spreads
# outliers, and it goes further: the *signs* of a random projection are enough to estimate an inner
# product without bias. QJL (Zandieh et al. 2024) stores the keys of an attention cache that way,
# one bit for each row of the projection. The package has no such codec yet: the few lines of the
# estimator stand here, and are held against theory.

# %%
import math

import torch

from spinlab.report.figures.tradeoff import draw_points
from spinlab.rotation.orthogonal import (
    bernoulli_projection,
    gaussian_projection,
    orthogonality_error,
    orthogonalize_rows,
    random_orthogonal,
)

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## Nearly orthogonal is not orthogonal
#
# A square matrix of independent $\mathcal N(0, 1/n)$ entries, or of signs over $\sqrt n$, has
# $\mathbb E[R R^\top] = I$. By the Johnson–Lindenstrauss lemma lengths are kept up to $\varepsilon
# \sim 1/\sqrt n$, which is good enough for a search, not for a network: layer after layer the
# function would drift. Orthogonalized rows are exact.

# %%
for n in (64, 256, 1024):
    gaussian, signs = gaussian_projection(n, generator), bernoulli_projection(n, generator)
    exact = orthogonalize_rows(gaussian)
    told = [f"{orthogonality_error(matrix):8.0e}" for matrix in (gaussian, signs, exact)]
    print(f"n = {n:4}: max|RRᵀ-I| of Gaussian {told[0]}, signs {told[1]}, orthogonalized {told[2]}")

# %% [markdown]
# ## The estimator
#
# For a key $k$ and a query $q$ in $\mathbb R^d$, and a sketch $S$ of $m$ rows from
# $\mathcal N(0, I_d)$, keep $\mathrm{sign}(Sk)$ and $\|k\|$. Then
#
# $$\widehat{\langle q, k\rangle} = \sqrt{\frac{\pi}{2}}\, \frac{\|k\|}{m}
# \,\big\langle S q,\, \mathrm{sign}(S k) \big\rangle .$$
#
# **Mean.** Along a row $s$, $\langle s, q\rangle$ is a part along $k$ plus one that is independent
# of $\mathrm{sign}\langle s, k\rangle$, so that
# $\mathbb E\big[\langle s,q\rangle\, \mathrm{sign}\langle s,k\rangle\big]
# = \tfrac{\langle q,k\rangle}{\|k\|}\, \mathbb E|g| = \tfrac{\langle q,k\rangle}{\|k\|}
# \sqrt{2/\pi}$ with $g \sim \mathcal N(0,1)$: the estimator is unbiased.
#
# **Variance.** The square of a term is $\langle s,q\rangle^2$, whose mean is $\|q\|^2$, whatever
# the sign. Over $m$ independent rows
#
# $$\mathrm{Var} = \frac1m \left( \frac{\pi}{2}\, \|q\|^2 \|k\|^2 - \langle q, k\rangle^2 \right).$$
#
# It does not depend on the direction of $k$, and outliers in $k$ cost nothing but its length.

# %%


def estimates(q: torch.Tensor, k: torch.Tensor, sketches: torch.Tensor) -> torch.Tensor:
    """Estimate ⟨q, k⟩ by each of some sketches (count, m, d) from the signs of S k."""
    products = ((sketches @ q) * (sketches @ k).sign()).sum(-1)
    return math.sqrt(math.pi / 2) * k.norm() / sketches.shape[1] * products


def variance(q: torch.Tensor, k: torch.Tensor, m: int) -> float:
    return ((math.pi / 2 * q.norm() ** 2 * k.norm() ** 2 - (q @ k) ** 2) / m).item()


d, m, count = 64, 128, 4000
k = torch.randn(d, generator=generator, dtype=torch.float64)
k[7] = 25  # keys have outlier channels too
q = torch.randn(d, generator=generator, dtype=torch.float64) + 0.2 * k
sketches = torch.randn(count, m, d, generator=generator, dtype=torch.float64)
found = estimates(q, k, sketches)
standard_error = math.sqrt(variance(q, k, m) / count)
print(f"⟨q, k⟩ = {q @ k:.3f}; mean of {count} sketches {found.mean():.3f} ± {standard_error:.3f}")
print(f"variance {found.var():.2f}, in theory {variance(q, k, m):.2f}")
assert abs(found.mean() - q @ k) < 3 * standard_error
assert abs(found.var() / variance(q, k, m) - 1) < 0.1

# %% [markdown]
# ## Orthogonalized rows
#
# QJL's code orthogonalizes the sketch in chunks of $d$ rows, each row of length $\sqrt d$. Terms
# of one chunk then avoid each other, and the variance falls below that of independent rows. A row
# of that length is not Gaussian any more, which leaves a small bias:
#
# $$\frac{\mathbb E\,\widehat{\langle q,k\rangle}}{\langle q,k\rangle}
# = \sqrt{\frac{\pi d}{2}}\; \frac{\Gamma(d/2)}{\sqrt\pi\;\Gamma\!\left(\frac{d+1}{2}\right)}
# \approx 1 + \frac{1}{4d}.$$

# %%
chunks = [math.sqrt(d) * random_orthogonal(d, generator) for _ in range(2 * count)]
orthogonal = torch.stack(chunks).view(count, m, d)
of_rows = estimates(q, k, orthogonal)
bias = math.sqrt(d / 2) * math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2))
print(f"variance: independent rows {found.var():.2f}, orthogonal rows {of_rows.var():.2f}")
print(f"mean over ⟨q, k⟩: {of_rows.mean() / (q @ k):.4f}, in theory {bias:.4f}")
assert of_rows.var() < found.var()
assert abs(of_rows.mean() / (q @ k) - bias) < 4 * of_rows.std() / (q @ k) / math.sqrt(count)

# %% [markdown]
# ## How many bits
#
# The error falls with $1/\sqrt m$: twice the precision costs four times the bits. Beside the signs
# a key has its length, 16 bits.

# %%
measured, theory = [], []
for rows in (32, 64, 128, 256, 512):
    spread = estimates(
        q, k, torch.randn(500, rows, d, generator=generator, dtype=torch.float64)
    ).std()
    bits, scale = rows / d + 16 / d, q.norm() * k.norm()
    measured.append((bits, (spread / scale).item()))
    theory.append((bits, math.sqrt(variance(q, k, rows)) / scale.item()))
draw_points(
    {"theory": theory, "measured": measured}, "bits per number of the key", "error / |q||k|"
)

# %% [markdown]
# An unbiased estimate of every score is worth more than a precise one that always errs to the same
# side, because a softmax averages over many keys. Rounding a rotated key to levels has less error
# at the same bits, but a bias; later methods (TurboQuant) round first and spend one bit of QJL on
# what is left.
