"""Time a method that rounds column by column over a whole model, and its parts."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from spinlab.bench.clock import now, peaks
from spinlab.bench.models import random_llama
from spinlab.config import (
    GPTAQConfig,
    GPTQConfig,
    KVConfig,
    QronosConfig,
    QuantConfig,
    WeightsConfig,
    plain,
)
from spinlab.kv.path import kv_path
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.track.environment import environment
from spinlab.weights import layerwise
from spinlab.weights.base import Rounding
from spinlab.weights.calibration import LayerInputs
from spinlab.weights.methods import METHODS
from spinlab.weights.pairs import PairedInputs

SCHEMA = 1
SETTINGS = {"gptq": GPTQConfig, "gptaq": GPTAQConfig, "qronos": QronosConfig}
# the parts that are timed: where their functions are looked up
_PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "hessians": ((layerwise, "gather"), (layerwise, "gather_pairs")),
    "factors": ((layerwise, "error_spread"), (layerwise, "mismatch")),
    "sweeps": tuple((layerwise, method) for method in SETTINGS),
    "forward": ((LayerInputs, "advance"), (PairedInputs, "advance")),
}


def bench_rounding(
    method: str, name: str, windows: tuple[int, int], layers: int | None, device: torch.device
) -> dict[str, Any]:
    """Return the record of one run: seconds, seconds of its parts, peak bytes.

    method: of SETTINGS. windows: how many of how many tokens, drawn at random as the weights are.
    """
    model = random_llama(name, layers, device)
    config = WeightsConfig(method, **{method: SETTINGS[method](*windows)})
    quant, head_dim = QuantConfig(), model.config.head_dim
    tokens = torch.randint(model.config.vocab_size, windows, generator=torch.Generator())
    r3, r4 = (hadamard_rotation(n) for n in (head_dim, model.config.intermediate_size))
    rotations, kv = RotationSet(r3=r3, r4=r4), kv_path(KVConfig(), head_dim, r3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder, _clocks(device) as seconds:
        rounding = Rounding(model, rotations, tokens, quant, config, Path(folder), kv)
        start = now(device)
        METHODS[method].work(rounding)
        total = now(device) - start
    metrics = {f"speed/{method}/seconds": total, **peaks(method, device)}
    metrics |= {f"speed/{method}/seconds/{part}": value for part, value in seconds.items()}
    settings = {"model": name, "layers": model.config.num_hidden_layers, "device": device.type}
    return {
        "schema": SCHEMA,
        "experiment": f"bench/{method}/{name}",
        "environment": environment(),
        "config": {**settings, "quant": plain(quant), "weights": plain(config)},
        "metrics": metrics,
    }


@contextmanager
def _clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Add up the seconds of every part while the context lasts, once where one calls another."""
    seconds = dict.fromkeys(_PARTS, 0.0)

    running: set[str] = set()

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if part in running:
                return work(*args)
            running.add(part)
            start = now(device)
            result = work(*args)
            seconds[part] += now(device) - start
            running.remove(part)
            return result

        return run

    with ExitStack() as stack:
        for part, places in _PARTS.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds
