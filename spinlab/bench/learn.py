"""Time rotation learning on a model of full size with random weights, and where its time goes."""

import statistics
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.bench.clock import now, peaks
from spinlab.bench.models import random_llama
from spinlab.config import ClipSearch, Config, plain
from spinlab.learn import (
    Learnable,
    RotationLearner,
    choose_checkpoint,
    choose_shards,
    in_shards,
    is_sharded,
    recompute_layers,
)
from spinlab.model.modules import map_of
from spinlab.model.network import Resident
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import gather_statistics
from spinlab.track.environment import environment

SCHEMA = 1
_WARM_UP = 2  # steps that load kernels and fill the allocator
_PEAK = {"H100": 798e12, "H200": 798e12}  # dense bfloat16 products, as measured on the H100
# kinds of GPU kernels by parts of their names, in the order in which they are looked for
_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "rounding": ("round_kernel",),
    "norms": ("rms_norm", "layer_norm", "RmsNorm", "LayerNorm"),
    "gathering": ("nccl",),
    "softmax": ("softmax", "SoftMax"),
}


def bench_learn(
    name: str, config: Config, layers: int | None, device: torch.device
) -> dict[str, Any]:
    """Return the record of one run of `learn.steps` steps on random tokens.

    Seconds are those of all steps, as the loop takes them; a step's is the median.
    """
    learn = config.learn
    shape = random_llama(name, layers, torch.device("meta"))
    expected = choose_shards(shape, learn, config.quant, parallel.world(), device)
    checkpoint = choose_checkpoint(expected, learn, device)
    learner = _learner(name, config, layers, device, expected.shards)
    if checkpoint:
        recompute_layers(learner.model)
    count = (learn.steps + _WARM_UP + 1) * learn.batch
    generator = torch.Generator().manual_seed(0)
    vocabulary = learner.model.config.vocab_size
    tokens = torch.randint(vocabulary, (count, learn.sequence_length), generator=generator)
    batches = tokens.split(learn.batch)
    for index in range(_WARM_UP):
        learner.step(0, batches[learn.steps + index])
    shares = _shares(learner, batches[-1])
    seconds, losses = _timed(learner, batches[: learn.steps], device)
    metrics = _metrics(learner, seconds, device) | shares | {"learn/last_loss": losses[-1]}
    settings = {"model": name, "layers": learner.model.config.num_hidden_layers}
    settings |= {"sharded": is_sharded(learner.model), "checkpoint": checkpoint}
    settings |= {"dtype": str(learner.model.dtype).removeprefix("torch."), "device": device.type}
    return {
        "schema": SCHEMA,
        "experiment": f"bench/learn/{name}",
        "environment": environment(),
        "config": {
            **settings,
            **{part: plain(getattr(config, part)) for part in ("learn", "rotation", "quant", "kv")},
        },
        "metrics": metrics,
        "curve": losses,
    }


def _learner(
    name: str, config: Config, layers: int | None, device: torch.device, shards: bool
) -> RotationLearner:
    """Draw the model and put it under learning, from what its rotations start from.

    shards: its weights, which are in no file, are spread over processes once they are drawn.
    """

    def original() -> PreTrainedModel:
        torch.manual_seed(0)
        return random_llama(name, layers, device)

    learn, quant, rotation = config.learn, config.quant, config.rotation
    model, generator = original(), torch.Generator().manual_seed(0)
    networks, statistics = RotatedNetworks(lambda: model, quant, config.kv), None
    if rotation.needs_statistics:
        shape = 1, learn.sequence_length
        window = torch.randint(model.config.vocab_size, shape, generator=generator)
        plain = networks.stream_rotated(RotationSet(keeps_gains=rotation.keeps_gains))
        statistics = gather_statistics(plain, window, rotation.searches)
    start = initial_rotations(rotation, map_of(model), generator, statistics, device)
    network = networks.learnable(start, inputs="inputs" in learn.rotations)
    if shards:
        both = Resident(lambda: network), Resident(original)
        found = in_shards(*both, map_of(network), learn, quant)
    else:
        needs = learn.objective.needs_teacher and learn.rounds(quant)
        found = Learnable(network, original() if needs else None)
    formats = learn, quant, ClipSearch()
    return RotationLearner(found.model, start, *formats, found.teacher, linears=found.linears)


def _timed(
    learner: RotationLearner, batches: tuple[torch.Tensor, ...], device: torch.device
) -> tuple[list[float], list[float]]:
    """Return the seconds and the loss of every step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = [], []
    for index, batch in enumerate(batches):
        start = now(device)
        losses.append(learner.step(index, batch)["loss"])
        seconds.append(now(device) - start)
    return seconds, losses


def _metrics(
    learner: RotationLearner, seconds: list[float], device: torch.device
) -> dict[str, float]:
    learn = learner.learn
    tokens = learn.batch * learn.sequence_length
    metrics = {
        "speed/learn/seconds": sum(seconds),
        "speed/learn/seconds/step": statistics.median(seconds),
        "speed/learn/tokens_per_second": tokens / statistics.median(seconds),
        **peaks("learn", device),
    }
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if peak := next((value for key, value in _PEAK.items() if key in gpu), None):
        numbers = sum(p.numel() for p in learner.model.parameters())
        floor = 3 * 2 * numbers * tokens * len(seconds) / (peak * parallel.world())
        metrics |= {
            "speed/learn/floor": floor,
            "speed/learn/over_floor": metrics["speed/learn/seconds"] / floor,
        }
    return metrics


def _shares(learner: RotationLearner, batch: torch.Tensor) -> dict[str, float]:
    """Return the share of each kind of kernel in the GPU's time over one step."""
    if learner.model.device.type != "cuda" or not parallel.is_main():
        learner.step(0, batch)
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        learner.step(0, batch)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in trace.key_averages():
        kind = next((k for k, words in _KINDS.items() if any(w in event.key for w in words)), "")
        times[kind or "elementwise"] = (
            times.get(kind or "elementwise", 0) + event.self_device_time_total
        )
    total = sum(times.values())
    return {f"share/learn/{kind}": value / total for kind, value in times.items()}
