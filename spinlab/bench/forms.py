"""Time an experiment's learning against its plain definition, one after the other."""

import statistics
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from spinlab.bench.clock import now
from spinlab.config import Config, plain
from spinlab.learn.spaces import PlainSpace
from spinlab.model.modules import map_of
from spinlab.stages.pipeline import Pipeline
from spinlab.track.environment import environment
from spinlab.weights.layerwise import check_weight_groups


def bench_forms(config: Config) -> dict[str, Any]:
    """Return the record of a run of `learn.steps` steps in each way of computing them.

    Both start from the same rotations and read the same windows; the plain one rotates every weight
    in float64 at each forward pass, as SpinQuant's published code does.
    """
    disable_progress_bar()  # of loading a checkpoint, as in a run
    pipeline = Pipeline(config)
    learn = config.learn
    PlainSpace.check(learn)
    windows = pipeline.calibration.windows(
        "learn", learn.steps * learn.batch, learn.sequence_length
    )
    check_weight_groups(map_of(pipeline.original.shape), config.quant)
    seconds: dict[str, list[float]] = {"fast": [], "plain": []}
    losses: dict[str, list[float]] = {"fast": [], "plain": []}
    for name, space in (("fast", None), ("plain", PlainSpace)):
        learner = pipeline.learning.learner(space)
        for index, batch in enumerate(windows.split(learn.batch)):
            begin = now(pipeline.run.device)
            losses[name].append(learner.step(index, batch)["loss"])
            seconds[name].append(now(pipeline.run.device) - begin)
    return {
        "schema": 1,
        "experiment": f"bench/forms/{config.name}",
        "environment": environment(),
        "config": plain(config),
        "metrics": _metrics(seconds, losses),
        "curves": losses,
    }


def _metrics(seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, float]:
    fast, slow = (torch.tensor(losses[name]).double() for name in ("fast", "plain"))
    metrics = {f"speed/learn/seconds/{name}": sum(values) for name, values in seconds.items()}
    steps = {name: statistics.median(values) for name, values in seconds.items()}
    metrics |= {f"speed/learn/seconds/step/{name}": value for name, value in steps.items()}
    ratios = [b / a for a, b in zip(seconds["fast"], seconds["plain"], strict=True)]
    return metrics | {
        "speed/learn/speedup": metrics["speed/learn/seconds/plain"]
        / metrics["speed/learn/seconds/fast"],
        "speed/learn/speedup/median": statistics.median(ratios),
        "learn/curve_difference": ((fast - slow).abs() / slow).max().item(),
    }
