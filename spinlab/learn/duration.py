"""Tell what a learning run will take: its estimate, and the time that a probe makes of it."""

import logging
import time

import torch

from spinlab.learn.estimate import Estimate
from spinlab.machine import gib, memory_for

log = logging.getLogger(__name__)

_EFFICIENCY = {"cpu": 0.6, "cuda": 0.5}  # of a run's products, in those of the probe
_PROBE_ROWS = {"cpu": 256, "cuda": 8192}
_TINY = {"cpu": 1e11, "cuda": 1e14}  # operations that are over before anyone asks
_WORTH_TELLING = 5  # seconds


def announce(estimate: Estimate, checkpoint: bool, device: torch.device) -> None:
    """Log about how long the run takes and how much memory."""
    seconds = _seconds(estimate, checkpoint, device)
    kept = estimate.activations_checkpointed if checkpoint else estimate.activations
    log.info(
        "%-12s %s%s of %s GiB (weights %s, activations %s%s, rest %s)",
        "learn",
        f"about {_duration(seconds)} and " if seconds >= _WORTH_TELLING else "",
        gib(estimate.bytes(checkpoint)),
        gib(memory_for(device)),
        gib(estimate.weights),
        gib(kept),
        " recomputed" if checkpoint else "",
        gib(estimate.rest),
    )


def _seconds(estimate: Estimate, checkpoint: bool, device: torch.device) -> float:
    """Return about how long the run takes, from a short measurement; 0 for tiny ones."""
    flops = estimate.flops_checkpointed if checkpoint else estimate.flops
    if flops + estimate.wide_flops < _TINY[device.type]:
        return 0.0
    narrow = _rate(estimate.hidden, estimate.dtype, device)
    wide = _rate(estimate.hidden, torch.promote_types(estimate.dtype, torch.float32), device)
    return (flops / narrow + estimate.wide_flops / wide) / _EFFICIENCY[device.type]


def _rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations per second of products (rows, n) (n, n): the best of three."""
    rows = _PROBE_ROWS[device.type]
    generator = torch.Generator(device).manual_seed(0)  # zeros would be faster than numbers are
    x = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    matrix = torch.randn(width, width, device=device, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        found = x @ matrix
        found[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width**2 / best


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds:.0f} s"
