"""Read every export of a run back, by the reader that it is for, and measure what that computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinlab.config import Config, plain
from spinlab.errors import InputError
from spinlab.evaluate.perplexity import perplexity
from spinlab.experiment import run
from spinlab.export.targets import place_of
from spinlab.rotation.check import logits_error, logits_of
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.rotations import gate_ids
from spinlab.stages.text import windows_in
from spinlab.track.environment import environment

SCHEMA = 1


def bench_exports(config: Config, overrides: list[str]) -> dict[str, Any]:
    """Return the record of a run and of its exports, which stay where the settings put them.

    Of each: its bytes, absolute and over those of the original in 16 bits; the perplexity of what
    its reader makes of it; how far its logits are from those of the network that it stands for
    (max|Δ| relative to their deviation), and that network's perplexity.
    """
    targets = {name: path for name, path in config.export.targets.items() if name in READERS}
    if not targets:
        raise InputError(f"name at least one export of {', '.join(READERS)}: export.artefact=...")
    run(config, overrides)
    pipeline = Pipeline(config)
    metrics: dict[str, float] = {"bytes/original": pipeline.measure("fp")["bytes/fp"]}
    for name, path in targets.items():
        place = place_of(path)
        files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
        tensors = [f for f in files if f.suffix in (".safetensors", ".gguf")]
        metrics[f"bytes/{name}"] = float(sum(file.stat().st_size for file in tensors))
        metrics[f"ratio/bytes/{name}"] = metrics[f"bytes/{name}"] / metrics["bytes/original"]
        metrics |= _measured(pipeline, name, lambda n=name, p=place: READERS[n](p, config))
    return {
        "schema": SCHEMA,
        "experiment": f"bench/exports/{config.name}",
        "environment": environment(),
        "config": {k: v for k, v in plain(config).items() if k not in ("paths", "export")},
        "metrics": metrics,
    }


def _measured(
    pipeline: Pipeline, name: str, read: Callable[[], PreTrainedModel]
) -> dict[str, float]:
    """Compare what an export's reader makes of it with the network that it stands for."""
    floats = name == "checkpoint" or (name, pipeline.config.export.gguf_type) == ("gguf", "f16")
    meant = "fp" if floats else "fake"
    ids = gate_ids(pipeline.original, pipeline.calibration).to(pipeline.run.device)
    expected = logits_of(lambda: pipeline.network(meant)[0], ids)
    found = logits_of(read, ids)
    metrics = {
        f"logits_error/{name}": logits_error(found, expected),
        f"same_bits/{name}": float(torch.equal(found, expected)),
    }
    model, of_run = read(), pipeline.measure(meant)
    for label, windows in windows_in(pipeline.evaluation).items():
        batch = pipeline.config.eval.batch
        metrics[f"ppl/{label}/{name}"] = perplexity(model, windows, batch, f"{name} {label}")
        metrics[f"ppl/{label}/{name}/{meant}"] = of_run[f"ppl/{label}/{meant}"]
    return metrics


def _artefact(place: Path, config: Config) -> PreTrainedModel:
    from spinlab.artefact.read import load

    return load(place, config.runtime.backend, config.runtime.device)


def _stock(place: Path, config: Config, **more: Any) -> PreTrainedModel:
    """Load by transformers alone, in the dtype of the run."""
    dtype = getattr(torch, config.model.dtype)
    load: Any = AutoModelForCausalLM.from_pretrained
    return load(place, dtype=dtype, local_files_only=True, **more).eval()


def _gguf(place: Path, config: Config) -> PreTrainedModel:
    return _stock(place.parent, config, gguf_file=place.name)


READERS: dict[str, Callable[[Path, Config], PreTrainedModel]] = {
    "artefact": _artefact,
    "checkpoint": _stock,
    "compressed_tensors": _stock,
    "gguf": _gguf,
}
