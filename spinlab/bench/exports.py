"""Read the exports of a run back, by the programs that they are for, and measure these."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from spinlab.bench.readers import readers_of
from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.experiment import run
from spinlab.export.targets import place_of
from spinlab.metrics.perplexity import perplexity
from spinlab.rotation.check import logits_error, logits_of
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.rotations import gate_ids
from spinlab.stages.text import windows_in
from spinlab.track.environment import environment

SCHEMA = 1


def bench_exports(config: Config, overrides: list[str]) -> dict[str, Any]:
    """Return the record of a run and of its exports, which stay where the settings put them.

    bytes/<export>, ratio/bytes/…      of its tensors; over the original's in 16 bits
    ppl/<text>/<export>/network        of the network that it stands for, as the run measured it
    ppl/<text>/<export>/<reader>       of what a program makes of it
    logits_error/<export>/<reader>     max|Δ| of the two networks, relative to the deviation
    same_bits/<export>/<reader>        1 where there is no difference
    """
    targets = {name: path for name, path in config.export.targets.items() if readers_of(name)}
    if not targets:
        raise InputError("name at least one export that is a model: export.artefact=FOLDER ...")
    of_run = run(config, overrides).as_json()
    pipeline = Pipeline(config)
    metrics: dict[str, float] = {"bytes/original": pipeline.measure("fp")["bytes/fp"]}
    for name, path in targets.items():
        place = place_of(path)
        metrics[f"bytes/{name}"] = _bytes(place)
        metrics[f"ratio/bytes/{name}"] = metrics[f"bytes/{name}"] / metrics["bytes/original"]
        metrics |= _measured(pipeline, name, place)
    export = config.export
    options = {"compressed_tensors": ("profile",), "gguf": ("gguf_type",)}
    asked = (o for name in targets for o in options.get(name, ()))
    words = [word for word in of_run["overrides"] if not word.startswith("tracker")]
    return {
        "schema": SCHEMA,
        "experiment": f"bench/exports/{config.name}",
        "environment": environment(),
        "overrides": [*words, *(f"export.{option}={getattr(export, option)}" for option in asked)],
        "config": of_run["config"],
        "metrics": metrics,
    }


def _bytes(place: Path) -> float:
    """Return the bytes of an export's tensors."""
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return float(sum(file.stat().st_size for file in files))


def _measured(pipeline: Pipeline, name: str, place: Path) -> dict[str, float]:
    """Compare what programs make of an export with the network that it stands for."""
    floats = name == "checkpoint" or (name, pipeline.config.export.gguf_type) == ("gguf", "f16")
    meant = "fp" if floats else "fake"
    ids = gate_ids(pipeline.original, pipeline.calibration).to(pipeline.run.device)
    expected = logits_of(lambda: pipeline.network(meant)[0], ids)
    of_run = pipeline.measure(meant)
    texts = windows_in(pipeline.evaluation)
    metrics = {f"ppl/{text}/{name}/network": of_run[f"ppl/{text}/{meant}"] for text in texts}
    for reader, read in readers_of(name).items():
        found = _read(pipeline, partial(read, place), ids, expected)
        metrics |= {f"{metric}/{name}/{reader}": value for metric, value in found.items()}
    return metrics


def _read(
    pipeline: Pipeline, read: partial, ids: torch.Tensor, expected: torch.Tensor
) -> dict[str, float]:
    model = read(pipeline.config)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    metrics = {
        "logits_error": logits_error(logits, expected),
        "same_bits": float(torch.equal(logits, expected)),
    }
    for text, windows in windows_in(pipeline.evaluation).items():
        metrics[f"ppl/{text}"] = perplexity(model, windows, pipeline.config.eval.batch, text)
    return metrics
