# %% [markdown]
# # DuQuant, step by step
#
# DuQuant (Lin et al. 2024) does not learn its rotations and does not draw them blindly either: it
# *looks* where the outliers are and builds rotations that spread just these. A row $x$ becomes
#
# $$x \;\mapsto\; x\,\Lambda^{-1}\, \hat R_{(1)}\, P\, \hat R_{(2)},$$
#
# smoothing, rotations in blocks of channels, a permutation, rotations in blocks again; the weight
# gets the inverse. All of it is done here on matrices that fit on the page.

# %%
import torch

from spinlab.report.figures.steps import draw_steps, example
from spinlab.rotation.duquant import (
    DualTransform,
    dual_transforms,
    greedy_rotation,
    random_mixers,
    rotate_blocks,
    uniform_first_row,
    zigzag,
)
from spinlab.rotation.orthogonal import orthogonality_error

torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## One rotation that spreads channel 0
#
# $\tilde R$ is orthogonal and its first row is uniform, every entry $1/\sqrt n$: what stands in
# channel 0 is shared out evenly. (It is Helmert's matrix, a product of $n-1$ plane rotations.)

# %%
r = uniform_first_row(4)
print(r)
print(f"max|RRᵀ - I| = {orthogonality_error(r):.0e}")

# %% [markdown]
# An outlier in another channel $c$ is brought to channel 0 and back by the exchange $E_c$, and the
# other channels may be mixed by any rotation $Q'$ of their own:
#
# $$R^i = E_c\,\tilde R\,Q\,E_c, \qquad Q = \begin{pmatrix} 1 & 0 \\ 0 & Q' \end{pmatrix}.$$
#
# ## The example
#
# Three tokens of four channels, channel 1 near $\pm 10$ and the others near 0.2. First a plane
# rotation by $\pi/4$ of channels 1 and 2, by hand: $10 \cos \tfrac{\pi}{4} \approx 7.07$ in both.
# Then the greedy rotation, with $Q' = I$, finds the peak in channel 1 and spreads it over all
# four. These numbers are computed by the functions that the package itself uses.

# %%
steps = example()
draw_steps(steps)

# %%
shared, spread = list(steps.values())[1:]
rotation = greedy_rotation(torch.from_numpy(shared)[None], torch.eye(4).repeat(6, 1, 1))[0]
print(rotation)
print(torch.from_numpy(shared) @ rotation)
for title, x in steps.items():
    print(f"{title:40} max|x| = {abs(x).max():7.4f}   |first row| = {(x[0] ** 2).sum() ** 0.5:.4f}")
assert [round(abs(x).max(), 4) for x in steps.values()] == [10.2, 7.3893, 5.8855]

# %% [markdown]
# No rotation changes the length of a row, so a peak cannot fall below length over $\sqrt n$: here
# $10/\sqrt 4 \approx 5$. Channel 1 got 2.4 instead of 5: with $Q' = I$ one rotation spreads one
# channel well, and what was in channel 1 goes where its own row sends it.
#
# ## Greedy search
#
# One step hits one channel, and may raise a peak elsewhere. So steps follow each other, each at
# the place of the peak that the last one left, with a fresh random $Q'$, and of all their products
# the one with the lowest peak is kept. The empty product counts too: the search never makes a peak
# higher.

# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(200, 64, generator=generator, dtype=torch.float64)
x[:, [3, 4, 40]] *= torch.tensor([30.0, 20.0, 10.0], dtype=torch.float64)
lowest = (x.norm(dim=1) / 8).max()
peaks = {}
for steps_taken in (0, 1, 4, 16, 64, 256):
    mixers = random_mixers(64, steps_taken, torch.Generator().manual_seed(1))
    peaks[steps_taken] = (x @ greedy_rotation(x[None], mixers)[0]).abs().max().item()
    print(f"{steps_taken:4} steps: max|x R| = {peaks[steps_taken]:6.2f}")
print(f"no rotation can do better than {lowest:.2f}")
assert sorted(peaks.values(), reverse=True) == list(peaks.values())

# %% [markdown]
# The public code exchanges another channel than the text says: the *row* of the peak modulo the
# block size, so that it depends on the order of the tokens where the outlier is looked for. As the
# best of many random rotations it still works; with few steps the difference shows.

# %%
for steps_taken in (1, 4, 16):
    mixers = random_mixers(64, steps_taken, torch.Generator().manual_seed(1))
    slip = (x @ greedy_rotation(x[None], mixers, legacy_index=True)[0]).abs().max()
    print(
        f"{steps_taken:4} steps: {peaks[steps_taken]:6.2f} as written, {slip:6.2f} with that index"
    )

# %% [markdown]
# ## Blocks, and why a permutation stands between them
#
# A rotation of all channels would be a large product for every token. Blocks are cheap, but a block
# cannot give to another one: where two outliers share a block, it stays high. The zigzag
# permutation deals the channels to $K$ blocks in the order of their peaks,
# $1, 2, \dots, K, K, \dots, 2, 1, 1, \dots$, which evens out the blocks' means. Eight channels in
# two blocks:

# %%
row = torch.tensor([[8.0, 7.0, 0.5, 0.3, 0.2, 0.4, 0.1, 0.6]], dtype=torch.float64)
tokens = torch.cat([row, -row.roll(1, 0) * 0.9, row * 1.1])
(transform,) = dual_transforms(tokens[None], random_mixers(4, 32, generator), shared=False)
first = rotate_blocks(tokens, transform.first)
permuted = first[:, transform.permutation]
second = transform.apply(tokens)
draw_steps(
    {
        "activations, blocks of 4": tokens.numpy(),
        "first rotation: each block by itself": first.numpy(),
        "zigzag permutation": permuted.numpy(),
        "second rotation": second.numpy(),
    }
)

# %%
order = zigzag(first.abs().amax(0), block=4)
assert torch.equal(order, transform.permutation)
for title, y in {"after the first rotation": first, "after the permutation": permuted}.items():
    means = y.abs().amax(0).view(2, 4).mean(1)
    print(f"{title:26} mean peak of the two blocks: {means[0]:.2f} and {means[1]:.2f}")
assert second.abs().max() < first.abs().max() < tokens.abs().max()

# %% [markdown]
# ## The whole transform
#
# Together they are one orthogonal matrix: a layer that reads $xT$ gets the weight $WT$, and
# nothing changes but what is quantized. Unlike R1 it cannot be fused into the layer that writes
# $x$: it runs before every linear. Blocks must be large enough to share an outlier out; a larger
# one costs more for every token, and the search needs more steps to make use of it.

# %%
weight = torch.randn(16, 64, generator=generator, dtype=torch.float64)
for block in (4, 8, 16, 32, 64):
    transform: DualTransform = dual_transforms(x[None], random_mixers(block, 64, generator))[0]
    y = transform.apply(x)
    kept = (y @ transform.apply(weight).T - x @ weight.T).abs().max()
    print(f"blocks of {block:2}: max|x T| = {y.abs().max():6.2f}   xWᵀ kept to {kept:.0e}")
    assert kept < 1e-11

# %% [markdown]
# Smoothing comes before all of it: $\Lambda_j = \max|X_j|^{\alpha} / \max|W_j|^{1-\alpha}$ moves a
# part of every channel's size from activations to weights. `spinlab +experiment=toy
# +method=duquant` runs the method on a network, and `rotation.duquant.legacy_index=true` with the
# public code's index.
