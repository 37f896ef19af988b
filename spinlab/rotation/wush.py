"""WUSH: the transform of an input in blocks that best suits both the input and its weights.

A group of numbers x that is rounded with a scale of its own is off by ε|x|/√b in each of its b
numbers, and so are weights w. To second order in ε their product is off by |x|²|w|²·2ε²/b in the
mean square, and for x and w that do not know of each other by E|x|²·E|w|². With x T and w T⁻ᵀ in
their place this is |X'ᵀT|²·|W'ᵀT⁻ᵀ|² in Frobenius norms, where X'X'ᵀ = E[xᵀx] and W'W'ᵀ = E[wᵀw].
By Cauchy and Schwarz it is at least the squared nuclear norm of W'ᵀX' = U S Vᵀ, which is what it is
with T = W' U S^-1/2: both sides then have the second moment S. A Hadamard matrix behind it makes
them H S Hᵀ, in which all numbers have one variance (WUSH, ICML 2026).

Any factors will do: another X' turns V alone, another W' turns U by what W' U takes back.
"""

import torch

from spinlab.rotation.orthogonal import exact_hadamard


def wush_blocks(of_inputs: torch.Tensor, of_weights: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Return T, for x ↦ x·T, of every block: (k, b, b) float64.

    of_inputs, of_weights: (k, b, b) second moments E[xᵀx] and E[wᵀw] of rows. percdamp: what their
    diagonals get, as a part of their mean, so that no direction counts as empty. A block of inputs
    or weights that are all zero gets the Hadamard matrix alone.
    """
    moments = [moment.double() for moment in (of_weights, of_inputs)]
    means = [moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] for moment in moments]
    there = (means[0] > 0) & (means[1] > 0)
    eye = torch.eye(of_inputs.shape[-1], dtype=torch.float64, device=of_inputs.device)
    damped = (m + percdamp * mean * eye for m, mean in zip(moments, means, strict=True))
    w, x = (torch.linalg.cholesky(torch.where(there, moment, eye)) for moment in damped)
    u, s, _ = torch.linalg.svd(w.mT @ x)
    # the signs of singular vectors are a library's choice
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    u = u * largest.sign() * s.rsqrt()[:, None]
    hadamard = exact_hadamard(of_inputs.shape[-1], "rotation.inputs=wush").to(u.device)
    return w @ u @ hadamard.mT
