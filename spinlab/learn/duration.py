"""Tell what a learning run will take: its estimate, and the time that a probe makes of it."""

import logging

import torch

from spinlab.device import float32_products_for
from spinlab.learn.estimate import Estimate
from spinlab.machine import gib, memory_for
from spinlab.speed import TINY, WORTH_TELLING, duration, product_rate

log = logging.getLogger(__name__)

_EFFICIENCY = {"cpu": 0.6, "cuda": 0.5}  # of a run's products, in those of the probe
_PROBE_ROWS = {"cpu": 256, "cuda": 8192}


def announce(estimate: Estimate, checkpoint: bool, device: torch.device) -> None:
    """Log about how long the run takes and how much memory."""
    seconds = _seconds(estimate, checkpoint, device)
    kept = estimate.activations_checkpointed if checkpoint else estimate.activations
    log.info(
        "%-12s %s%s of %s GiB (weights %s, activations %s%s, rest %s)",
        "learn",
        f"about {duration(seconds)} and " if seconds >= WORTH_TELLING else "",
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
    if flops + estimate.wide_flops < TINY[device.type]:
        return 0.0
    narrow = _rate(estimate.hidden, estimate.dtype, device)
    with float32_products_for(estimate.dtype, device):
        wide = _rate(estimate.hidden, torch.promote_types(estimate.dtype, torch.float32), device)
    return (flops / narrow + estimate.wide_flops / wide) / _EFFICIENCY[device.type]


def _rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations per second of products (rows, n) (n, n)."""
    return product_rate((_PROBE_ROWS[device.type], width, width), dtype, device)
