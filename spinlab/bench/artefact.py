"""Load an artefact of random weights in a process of its own: seconds, and memory over its size."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

from spinlab.bench.models import DTYPES, SHAPES
from spinlab.bench.resident import Watch, own_bytes
from spinlab.config import Config, EvalConfig, ModelConfig, QuantConfig, RotationConfig, plain
from spinlab.errors import InputError
from spinlab.export.artefact import write
from spinlab.export.base import Subject
from spinlab.export.listing import read_listing
from spinlab.formats import format_of
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import prepared
from spinlab.model.modules import linears_of, map_of
from spinlab.model.settings import on_meta
from spinlab.rotation.initial import initial_rotations
from spinlab.track.environment import environment
from spinlab.weights.quantized import QuantizedWeight, empty_weight

SCHEMA = 1


class RandomWeights(Mapping[str, QuantizedWeight]):
    """Draw the rounded weight of every linear of a model when it is asked for."""

    def __init__(self, model: PreTrainedModel, quant: QuantConfig) -> None:
        self.format = format_of(quant.weights)
        self.shapes = {s.path: (s.out_features, s.in_features) for s in map_of(model).sites}

    def __getitem__(self, name: str) -> QuantizedWeight:
        rows, width = self.shapes[name]
        lowest, highest = self.format.lowest, self.format.highest
        levels = torch.randint(lowest, highest + 1, (rows, width), dtype=torch.int16)
        scale = torch.full((rows, 1), 1e-3)
        return QuantizedWeight(levels, scale, torch.zeros_like(scale), self.format)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def bench_artefact(name: str, layers: int | None, device: torch.device) -> dict[str, Any]:
    """Return the record of one run: an artefact of a shape is written, then loaded elsewhere.

    Memory of the host is what the process holds beyond pages of files, over what it held before;
    both are compared with the bytes of the artefact.
    """
    with tempfile.TemporaryDirectory(prefix="spinlab-") as folder:
        place = Path(folder) / "artefact"
        config = _write(name, layers, place)
        size = sum(file.stat().st_size for file in place.iterdir())
        command = [sys.executable, "-m", "spinlab.bench.artefact", str(place), str(device)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"loading failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    metrics = {"bytes/artefact": float(size), **found}
    for where in ("host", "device"):
        if peak := found.get(f"bytes/artefact/load/{where}"):
            metrics[f"ratio/artefact/load/{where}"] = peak / size
    return {
        "schema": SCHEMA,
        "experiment": f"bench/artefact/{name}",
        "environment": environment(),
        "config": {"model": name, "layers": layers, "device": device.type, **config},
        "metrics": metrics,
    }


def _write(name: str, layers: int | None, place: Path) -> dict[str, Any]:
    """Write an artefact of random weights, without a float model; return its formats."""
    shape = {**SHAPES[name], "max_position_embeddings": 4096, "tie_word_embeddings": False}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    dtype = DTYPES[name]
    settings = ModelConfig(dtype=str(dtype).removeprefix("torch."), architecture=shape)
    config = Config(model=settings, eval=EvalConfig(variants=["fake"], tasks=[]))
    model = prepared(on_meta(LlamaConfig(**shape)), dtype)
    model.generation_config = GenerationConfig()
    weights = RandomWeights(model, config.quant)
    for _, linear in linears_of(model):
        empty_weight(linear, dtype, torch.device("cpu"))
    for module in model.modules():
        for part, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = torch.ones(parameter.shape, dtype=dtype)
                setattr(module, part, nn.Parameter(drawn, requires_grad=False))
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(RotationConfig(), map_of(model), generator)
    unused = cast(Any, None)
    parts = (unused, unused, lambda given: model, byte_tokenizer, lambda: weights, unused)
    write(Subject(config, rotations, dict, *parts), str(place))
    return {"quant": plain(config.quant), "kv": plain(config.kv)}


def _loaded(folder: Path, device: str) -> dict[str, float]:
    """Load an artefact twice over its files, digests alone and then whole; return what it took."""
    import spinlab

    start = time.perf_counter()
    read_listing(str(folder), folder, "artefact")
    digests = time.perf_counter() - start
    if not (before := own_bytes()):
        raise InputError("this system does not tell a process's own memory, which is measured")
    with Watch() as watch:
        start = time.perf_counter()
        model = spinlab.load(folder, device=device)
        seconds = time.perf_counter() - start
    held = own_bytes()
    found = {
        "speed/artefact/load/seconds": seconds,
        "speed/artefact/digests/seconds": digests,
        "bytes/artefact/load/host": float(max(watch.most, held) - before),
        "bytes/artefact/loaded/host": float(held - before),
    }
    if model.device.type == "cuda":
        found["bytes/artefact/load/device"] = float(torch.cuda.max_memory_allocated(model.device))
        found["bytes/artefact/loaded/device"] = float(torch.cuda.memory_allocated(model.device))
    return found


if __name__ == "__main__":
    print(json.dumps(_loaded(Path(sys.argv[1]), sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and giving memory back takes seconds
