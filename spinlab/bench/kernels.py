"""Time the integer kernels against torch on bf16 and against other packages, in one run.

Ratios are of medians: `speedup/…` is torch's time over ours, `ratio/…` ours over torch's, `peer/…`
ours over a peer's. `floor/…` are seconds that memory traffic or tensor cores alone would take, at
the rates measured in this run, and `over_floor/…` how many times as long ours takes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spinlab.bench.formats import formats
from spinlab.bench.groups import groups
from spinlab.bench.kv_decode import kv
from spinlab.bench.operands import random_floats
from spinlab.bench.peer_parts import kv_peers, rotation_peers
from spinlab.bench.peers import linear_peers
from spinlab.bench.producers import producers
from spinlab.bench.products import decode, prefill
from spinlab.bench.results import Results
from spinlab.bench.timing import measure
from spinlab.bench.transforms import transforms
from spinlab.errors import InputError
from spinlab.runtime.fused.operations import Operations

PARTS: dict[str, Callable[..., None]] = {
    "prefill": prefill,
    "decode": decode,
    "producers": producers,
    "transforms": transforms,
    "formats": formats,
    "groups": groups,
    "kv": kv,
}


def bench_kernels(
    operations: Operations,
    device: torch.device,
    parts: Sequence[str],
    peers: Sequence[str] = (),
    path: Path | None = None,
) -> dict[str, Any]:
    """Return the record of the named parts of PARTS, and of the peers that `peers` begin.

    path: rewritten with every line that is found. Raises InputError without a CUDA device.
    """
    if device.type != "cuda":
        raise InputError(
            f"the kernels' benchmark needs a CUDA device and this is {device}: for a CPU there is "
            "python -m spinlab.bench cpu"
        )
    config = {"parts": list(parts), "peers": list(peers), "operations": operations.name}
    results = Results("bench/kernels", config, path)
    print(f"device: {torch.cuda.get_device_name(device)}")
    rates = ceilings(device, results)
    for part in parts:
        PARTS[part](operations, device, rates, results)
    for work in (kv_peers, rotation_peers, linear_peers):
        work(operations, device, tuple(peers), results)
    return results.record()


def ceilings(device: torch.device, results: Results, size: int = 8192) -> dict[str, float]:
    """Measure bytes/s of a copy, read and written, and operations/s of a square bf16 product."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (random_floats(size, size, generator=generator) for _ in range(2))
    source = torch.randint(256, (size * size * 16,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {"copy": [lambda: target.copy_(source)], "bf16": [lambda: a @ b]}
    seconds = {name: t.seconds for name, t in measure(works, device).items()}
    rates = {
        "copy": 2 * source.numel() / seconds["copy"],
        "bf16": 2 * size**3 / seconds["bf16"],
    }
    results.add({f"ceiling/{name}": rate for name, rate in rates.items()})
    return rates
