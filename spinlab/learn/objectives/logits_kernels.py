"""The Triton kernel behind `spinlab.learn.objectives.logits_triton`."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_LEAST = tl.constexpr(-3.0e38)  # below any logit, and no infinity: differences stay numbers


@triton.jit
def _taken(most, total, x, there):
    """Take x into sums of exp(x - most), lane by lane; return them and what old ones shrank by."""
    found = tl.maximum(most, x)
    shrunk = tl.exp(most - found)
    return found, total * shrunk + tl.where(there, tl.exp(x - found), 0.0), shrunk


@triton.jit
def _whole(most, total):
    """Return the largest of all lanes, by what each lane's sums shrink to it, and the sum."""
    top = tl.max(most, 0)
    shrunk = tl.exp(most - top)
    return top, shrunk, tl.sum(total * shrunk, 0)


@triton.jit
def loss_kernel(
    logits, original, labels, terms, share, COLUMNS: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write CE and KL of a row, and put the gradient in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * COLUMNS
    original += row * COLUMNS
    label = tl.load(labels + row)
    right = tl.load(logits + label).to(tl.float32)  # before gradients take the place of logits
    lanes = tl.arange(0, BLOCK)
    most, total = tl.full([BLOCK], _LEAST, tl.float32), tl.zeros([BLOCK], tl.float32)
    most_p, total_p = tl.full([BLOCK], _LEAST, tl.float32), tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)  # sums of exp(z_p - most_p)·(z_p - z_q)
    for start in range(0, COLUMNS, BLOCK):
        there = start + lanes < COLUMNS
        z = tl.load(logits + start + lanes, there, _LEAST).to(tl.float32)
        most, total, _ = _taken(most, total, z, there)
        if TEACHER:
            z_p = tl.load(original + start + lanes, there, _LEAST).to(tl.float32)
            most_p, total_p, shrunk = _taken(most_p, total_p, z_p, there)
            part = tl.exp(z_p - most_p) * (z_p - z)
            apart = apart * shrunk + tl.where(there, part, 0.0)
    top, _, total_q = _whole(most, total)
    log_q = top + tl.log(total_q)
    tl.store(terms + 2 * row, log_q - right)
    log_p = 0.0
    if TEACHER:
        top, shrunk, of_p = _whole(most_p, total_p)
        log_p = top + tl.log(of_p)
        kl = tl.sum(apart * shrunk, 0) / of_p - log_p + log_q
        tl.store(terms + 2 * row + 1, kl)
    for start in range(0, COLUMNS, BLOCK):
        there = start + lanes < COLUMNS
        z = tl.load(logits + start + lanes, there, _LEAST).to(tl.float32)
        gradient = tl.exp(z - log_q)
        if TEACHER:
            z_p = tl.load(original + start + lanes, there, _LEAST).to(tl.float32)
            gradient -= share * tl.exp(z_p - log_p)
        gradient -= tl.where(start + lanes == label, 1.0 - share, 0.0)
        tl.store(logits + start + lanes, gradient.to(logits.dtype.element_ty), there)
