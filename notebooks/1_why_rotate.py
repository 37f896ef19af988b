# %% [markdown]
# # Why rotate
#
# A 4-bit number has 16 levels. Activations of language models have a few channels, the *outliers*,
# that are tens of times larger than the others: they stretch the range that the levels must cover,
# and everything else falls on one or two of them. This notebook shows the problem on a small
# tensor, the cure, and both on a small network.

# %%
from tempfile import TemporaryDirectory

import torch

from spinlab.compose import composed
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.report.figures.outliers import TITLES, draw_outliers, draw_surfaces
from spinlab.rotation.check import logits, logits_error
from spinlab.rotation.orthogonal import (
    exact_hadamard,
    orthogonality_error,
    random_orthogonal,
    randomized_hadamard,
)
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.outliers import attention_inputs, peak_ratios, worst_layer
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.rotations import gate_ids, networks_of

generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The quantizer
#
# Every token (a row $x$) gets a scale and a zero point of its own, from its smallest and its
# largest number. With $b$ bits and a range that always contains 0,
#
# $$s = \frac{\max x - \min x}{2^b - 1}, \qquad z = \mathrm{round}\!\left(\frac{-\min x}{s}\right),
# \qquad q = \mathrm{clip}\!\left(\mathrm{round}\!\left(\frac{x}{s}\right) + z,\;
# 0,\; 2^b - 1\right),
# \qquad \hat x = s\,(q - z).$$
#
# An error of rounding is spread evenly over $\pm s/2$, so that its root mean square is
# $s/\sqrt{12}$: it grows with the range, not with the numbers.

# %%
quantizer = TokenQuantizer(IntegerFormat(bits=4, symmetric=False))
x = torch.randn(256, 128, generator=generator, dtype=torch.float64)
x[:, 17] *= 60  # one outlier channel among 128
ordinary = torch.arange(128) != 17

levels, scale, _ = quantizer.encode(x)
used = [len(row.unique()) for row in levels.flatten(1)[:, ordinary]]
error = quantizer.round_trip(x) - x
print(f"levels that the 127 ordinary channels use: {sum(used) / len(used):.1f} of 16")
print(f"root mean square of the error over s/sqrt(12): {(error / scale[:, 0] * 12**0.5).std():.2f}")

# %% [markdown]
# ## The rotation
#
# For an orthogonal $R$, $R R^\top = I$, a linear layer with weight $W$ (out, in) does not change
# when its input and its weight are rotated together:
#
# $$x W^\top = (x R)\,(W R)^\top .$$
#
# But what is quantized is now $xR$. The entries of a Hadamard matrix over $\sqrt n$ are all $\pm
# 1/\sqrt n$: an outlier $c$ in one channel becomes $\pm c/\sqrt n$ in each of them. The length of
# a token stays, its peak falls:
#
# $$\|xR\|_2 = \|x\|_2, \qquad \max_j |(xR)_j| \le \frac{\|x\|_1}{\sqrt n}.$$
#
# A random orthogonal matrix does nearly as well: of a token with an outlier it leaves a peak of
# about $\|x\|_2 \sqrt{2 \ln n / n}$.

# %%
weight = torch.randn(64, 128, generator=generator, dtype=torch.float64)
rotations = {
    "none": torch.eye(128, dtype=torch.float64),
    "random orthogonal": random_orthogonal(128, generator),
    "Hadamard": exact_hadamard(128),
    "randomized Hadamard": randomized_hadamard(128, generator),
}
errors = {}
print(f"{'rotation':20} {'|RRᵀ-I|':>8} {'xWᵀ kept to':>12} {'peak/rms':>9} {'error':>7}")
for name, r in rotations.items():
    y = x @ r
    kept = (y @ (weight @ r).T - x @ weight.T).abs().max()
    back = quantizer.round_trip(y) @ r.T  # rotated back, to compare it with x
    errors[name] = ((back - x)[:, ordinary].norm() / x[:, ordinary].norm()).item()
    peak = y.abs().max() / y.square().mean().sqrt()
    print(f"{name:20} {orthogonality_error(r):8.0e} {kept:12.0e} {peak:9.1f} {errors[name]:7.3f}")
assert all(errors[name] < errors["none"] / 1.5 for name in rotations if name != "none")

# %% [markdown]
# The last column is the error of the ordinary channels, relative to them: without a rotation hardly
# anything of them is left.
#
# ## In a network
#
# The toy model is a Llama of 185 thousand weights with outliers planted in its residual stream. R1
# rotates the stream, and because every layer that reads it holds $W R_1$ and every layer that
# writes it $R_1^\top W$, the network computes the same function. R2 does so for the values of
# every head, R3 for queries and keys, R4 inside the MLP.

# %%
folder = TemporaryDirectory()
pipeline = Pipeline(
    composed(
        "+experiment=toy", "learn=none", "eval.tasks=[]", "eval.max_windows=8",
        "eval.variants=[fp,rtn,fake]", "tracker=none",
        f"paths.cache={folder.name}/cache", f"paths.runs={folder.name}/runs",
    )
)  # fmt: skip
networks = networks_of(pipeline.run, pipeline.original)
ids = gate_ids(pipeline.original, pipeline.calibration)
found = pipeline.rotations("fake")
rotated, original = networks.rotated(found), pipeline.original.load()
difference = logits_error(logits(rotated, ids), logits(original, ids))
print(f"logits of the rotated network differ by {difference:.0e} of their spread")
assert difference < 1e-3

# %% [markdown]
# What attention reads, before and after: the largest magnitude of every channel, then all tokens.

# %%
inputs = {
    "before": attention_inputs(networks.rotated(RotationSet()), ids),
    "init": attention_inputs(networks.rotated(found), ids),
}
peaks = {name: torch.stack([x.amax(0) for x in layers]) for name, layers in inputs.items()}
layer = worst_layer(peaks)
site = f"toy, attention input of layer {layer}"
draw_outliers({TITLES[name]: p[layer].numpy() for name, p in peaks.items()}, site)

# %%
draw_surfaces({TITLES[name]: layers[layer].numpy() for name, layers in inputs.items()}, site)

# %% [markdown]
# And what it is worth: perplexity of the original, of the network rounded to nearest with 4-bit
# weights, activations and KV cache, and of the same with rotations.

# %%
metrics = {}
for variant, title in {"fp": "original", "rtn": "no rotation", "fake": "rotated"}.items():
    metrics |= pipeline.measure(variant)
    print(f"{title:12} {metrics[f'ppl/wiki/{variant}']:8.2f}")
before, after = (peak_ratios(peaks[name]).mean() for name in ("before", "init"))
print(f"peak / rms, mean over layers: {before:.1f} before, {after:.1f} after")
assert metrics["ppl/wiki/fp"] < metrics["ppl/wiki/fake"] < metrics["ppl/wiki/rtn"]
folder.cleanup()

# %% [markdown]
# The same on a real model is `spinlab +experiment=smollm2_135m_w4a4kv4`. Which rotation is best
# can be learned: that is the next notebook.
