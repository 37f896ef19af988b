"""Operations of methods that round weights on calibration text (`spinlab.weights`)."""

from collections.abc import Iterator

from spinlab.fakequant.insert import rounded_sites
from spinlab.memory.job import Job
from spinlab.memory.passes import Operations, of_kind, passing
from spinlab.model.map import Site
from spinlab.weights.calibration import GATED_BYTES, batch_of
from spinlab.weights.methods import METHODS


def sweeping(job: Job) -> Operations:
    """Count what GPTQ, GPTAQ and Qronos take: windows, moments of inputs, factors and sweeps.

    Several processes share out the windows, and each does the rest. Inputs that experts share out
    have moments of their own rows.
    """
    config = job.config.weights
    method, columns = METHODS[config.method], config.by_columns
    assert columns is not None
    samples, length = -(-columns.samples // job.processes), columns.sequence_length
    tokens, streams = samples * length, 2 if method.reads_inputs else 1
    wide = of_kind("float64", sum(_factoring(site) for site in _inputs(job)))
    found = streams * tokens * sum(2 * s.share * s.in_features**2 for s in _inputs(job))
    for site, _ in rounded_sites(job.map, job.config.quant):
        found += _swept(site, columns.block_size, config.method)
    if method.reads_inputs:  # what the inputs lack, on the factor; GPTAQ looks ahead with it
        products = 2 if config.method == "gptaq" else 1
        found += products * sum(2 * site.in_features**3 for site in _inputs(job))
    run = passing(job, tokens, length, job.config.model.dtype, head=False)
    run += of_kind(job.config.model.dtype, _again(job, samples, length))
    for _ in range(streams):
        wide += run
    return wide + of_kind("float32", found)


def _inputs(job: Job) -> Iterator[Site]:
    """Yield one linear for each tensor that rounded linears read."""
    yield from {site.rows: site for site, _ in rounded_sites(job.map, job.config.quant)}.values()


def _factoring(site: Site) -> float:
    """A Cholesky factor takes n³/3, and n³ its inverse."""
    return 4 / 3 * site.in_features**3


def _swept(site: Site, block: int, method: str) -> int:
    """Every column's error goes to those behind its block, and what its input lacks by GPTAQ.

    Qronos moves the weight by two products first.
    """
    width = site.in_features
    behind = sum(
        2 * min(block, width - n) * max(width - n - block, 0) for n in range(0, width, block)
    )
    moved = 2 * 2 * width**2 if method == "qronos" else 0
    return site.out_features * ((2 if method == "gptaq" else 1) * behind + moved)


def _again(job: Job, samples: int, length: int) -> float:
    """Count the products of gate and up on the way to the next layer.

    What down_proj reads of a layer with one MLP is kept of some batches, and made again of others.
    """
    batch = min(samples, batch_of(job.device, length))
    gated = batch * length * job.dimensions.intermediate * job.size
    rest = max(samples - GATED_BYTES // gated * batch, 0) * length
    tokens = {n: rest if layer.mlp else samples * length for n, layer in enumerate(job.map.layers)}
    sites = (s for s in job.map.sites if s.quantized and s.reads == "R1" and s.writes is None)
    attention = {n: f"{layer.attention.path}." for n, layer in enumerate(job.map.layers)}
    found = (s for s in sites if not s.path.startswith(attention[s.layer]))
    return sum(2 * tokens[s.layer] * s.numbers * s.share for s in found)


def lwc(job: Job) -> Operations:
    """Count what learnable clipping takes of the one process that does it.

    Windows go through the original and the rounded network; at every step the layer runs on one of
    them, and back to its weights, and to all of its inputs but the first.
    """
    windows = job.config.weights.lwc
    tokens, kind = windows.samples * windows.sequence_length, job.config.model.dtype
    run = passing(job, tokens, windows.sequence_length, kind, head=False)
    sites = [site for site, _ in rounded_sites(job.map, job.config.quant)]
    first = {site.layer: site.rows for site in reversed(sites)}
    back = sum(s.numbers * s.share * (1 + (s.rows != first[s.layer])) for s in sites)
    found = run + run + of_kind(kind, windows.epochs * 2 * tokens * back)
    for _ in range(windows.epochs):
        found += run
    return found
