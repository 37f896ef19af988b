"""Time GPTQ over a whole model, and its parts."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from spinlab.bench.clock import now, peaks
from spinlab.bench.models import random_llama
from spinlab.config import GPTQConfig, QuantConfig, WeightsConfig, plain
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.track.environment import environment
from spinlab.weights import layerwise
from spinlab.weights.base import Rounding
from spinlab.weights.calibration import LayerInputs
from spinlab.weights.layerwise import quantize_gptq

SCHEMA = 1
# the parts that are timed: where their functions are looked up
_PARTS: dict[str, tuple[Any, str]] = {
    "hessians": (layerwise, "gather"),
    "factors": (layerwise, "error_spread"),
    "sweeps": (layerwise, "gptq"),
    "forward": (LayerInputs, "advance"),
}


def bench_gptq(
    name: str, windows: tuple[int, int], layers: int | None, device: torch.device
) -> dict[str, Any]:
    """Return the record of one run: seconds, seconds of its parts, peak bytes.

    windows: how many of how many tokens, drawn at random as the weights are.
    """
    model = random_llama(name, layers, device)
    config = WeightsConfig(method="gptq", gptq=GPTQConfig(*windows))
    quant = QuantConfig()
    tokens = torch.randint(model.config.vocab_size, windows, generator=torch.Generator())
    rotations = RotationSet(r4=hadamard_rotation(model.config.intermediate_size))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder, _clocks(device) as seconds:
        start = now(device)
        quantize_gptq(Rounding(model, rotations, tokens, quant, config, Path(folder)))
        total = now(device) - start
    metrics = {"speed/gptq/seconds": total, **peaks("gptq", device)}
    metrics |= {f"speed/gptq/seconds/{part}": value for part, value in seconds.items()}
    settings = {"model": name, "layers": model.config.num_hidden_layers, "device": device.type}
    return {
        "schema": SCHEMA,
        "experiment": f"bench/gptq/{name}",
        "environment": environment(),
        "config": {**settings, "quant": plain(quant), "weights": plain(config)},
        "metrics": metrics,
    }


@contextmanager
def _clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Add up the seconds of every part while the context lasts."""
    seconds = dict.fromkeys(_PARTS, 0.0)

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = now(device)
            result = work(*args)
            seconds[part] += now(device) - start
            return result

        return run

    with ExitStack() as stack:
        for part, (owner, name) in _PARTS.items():
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds
