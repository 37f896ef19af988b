# %% [markdown]
# # Learn a rotation
#
# Any rotation leaves the network's function alone, so all of them may be tried: the one that is
# best for the *quantized* network can be searched by gradients. The one difficulty is to stay
# orthogonal. This notebook takes the steps of SpinQuant's optimizer by hand, then lets the package
# learn the rotations of a small network.

# %%
from tempfile import TemporaryDirectory

import torch

from spinlab.compose import composed
from spinlab.formats import IntegerFormat
from spinlab.formats.gradient import round_in_range
from spinlab.learn.optim.base import on_manifold
from spinlab.learn.optim.cayley import CayleySGD, cayley_exact, cayley_fixed_point, skew_generator
from spinlab.report.figures.curves import draw_curves
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal
from spinlab.stages.pipeline import Pipeline

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A step that stays orthogonal
#
# For a gradient $G$ at $R$ the *generator*
#
# $$W = \hat W - \hat W^\top, \qquad \hat W = G R^\top - \tfrac12 R\,(R^\top G R^\top),$$
#
# is skew-symmetric, $W = -W^\top$, and its Cayley transform is a rotation, which turns $R$ along
# the direction of descent:
#
# $$R \leftarrow \left(I + \tfrac{\alpha}{2} W\right)^{-1}\left(I - \tfrac{\alpha}{2} W\right) R .$$
#
# The inverse need not be computed. The next point $Y$ solves $Y = R - \tfrac{\alpha}{2} W (R +
# Y)$, and putting the right side in for $Y$ again and again contracts by at most
# $\tfrac{\alpha}{2}\|W\|$ each time; with the cap $\alpha \le 1/\|W\|_1$ five rounds are enough. A
# plain gradient step leaves the manifold at once:

# %%
n = 32
r = random_orthogonal(n, generator)
gradient = torch.randn(n, n, generator=generator, dtype=torch.float64)
skew = skew_generator(r, gradient)
alpha = 1 / skew.abs().sum(0).max()
steps = {
    "gradient step": r - alpha * gradient,
    "Cayley, five rounds": cayley_fixed_point(r, skew, alpha),
    "Cayley, solved": cayley_exact(r, skew, alpha),
}
for name, point in steps.items():
    print(f"{name:20} max|RRᵀ - I| = {orthogonality_error(point):.0e}")
assert orthogonality_error(steps["Cayley, solved"]) < 1e-13
assert (
    orthogonality_error(steps["Cayley, five rounds"])
    < 1e-2
    < orthogonality_error(steps["gradient step"])
)

# %% [markdown]
# What the five rounds leave is taken away by a projection now and then: the polar factor $UV^\top$
# of $R = U S V^\top$ is the nearest orthogonal matrix.
#
# ## Less error for one tensor
#
# Activations of 32 channels, with strong and weak directions and an outlier. What is minimized is
# the error of a 4-bit round trip of $xR$, $\|Q(xR) - xR\|^2$. Rounding has no gradient, but the
# range has one: the error is about $s/\sqrt{12}$ for each number, and $s$ follows from the
# extremes of a token (LSQ's gradient). So the search turns the tokens until their extremes are
# small.

# %%
mixing = random_orthogonal(n, generator) * torch.logspace(0.5, -0.5, n, dtype=torch.float64)
x = torch.randn(512, n, generator=generator, dtype=torch.float64) @ mixing
x[:, 5] *= 8
log_ratio, four_bits = torch.zeros(()), IntegerFormat(bits=4, symmetric=False)


def error_of(rotation: torch.Tensor) -> torch.Tensor:
    y = x @ rotation
    return (round_in_range(y, log_ratio, four_bits) - y).square().sum() / x.square().sum()


rotation = on_manifold(random_orthogonal(n, generator))
optimizer = CayleySGD([rotation], lr=3.0)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = error_of(rotation)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
plain = error_of(torch.eye(n, dtype=torch.float64)).item()
print(f"relative error: no rotation {plain:.4f}, random {losses[0]:.4f}, learned {losses[-1]:.4f}")
print(f"max|RRᵀ - I| after 100 steps: {orthogonality_error(rotation):.0e}")
assert losses[-1] < losses[0] < plain

# %% [markdown]
# ## The rotations of a network
#
# In a network the loss is that of the language model itself: the next token's cross-entropy, with
# activations, cache and here also weights rounded in every forward pass. R1 and the R2 of every
# layer are learned, and the curve of every step is told as it happens.

# %%
curve = []
folder = TemporaryDirectory()
pipeline = Pipeline(
    composed(
        "+experiment=toy", "rotation=random", "learn.steps=32", "eval.tasks=[]",
        "eval.max_windows=8", "eval.variants=[fp,init,fake]", "tracker=none",
        f"paths.cache={folder.name}/cache", f"paths.runs={folder.name}/runs",
    ),
    lambda step, values: curve.append(values),
)  # fmt: skip
metrics = {}
for variant, title in {"fp": "original", "init": "random", "fake": "learned"}.items():
    metrics |= pipeline.measure(variant)
    print(f"{title:10} {metrics[f'ppl/wiki/{variant}']:8.2f}")
assert metrics["ppl/wiki/fp"] < metrics["ppl/wiki/fake"] < metrics["ppl/wiki/init"]

# %%
draw_curves({"": curve})

# %% [markdown]
# The loss jumps from batch to batch, since each is other text. On the right, what the rotations
# lose of their orthogonality between two projections. What comes out is projected in float64, and
# the network is compared with the original before anything is quantized:

# %%
learned = pipeline.rotations("fake")
for name, deviation in learned.orthogonality().items():
    if name in ("r1", "r2"):
        print(f"{name}: max|RRᵀ - I| = {deviation:.0e}")
assert learned.orthogonality()["r1"] < 1e-12
folder.cleanup()

# %% [markdown]
# `spinlab +experiment=toy rotation=random` does all of this and keeps a record; other objectives
# and optimizers are `learn.objective.*` and `learn.optimizer`.
