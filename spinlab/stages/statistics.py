"""Stage `statistics`: what the calibration text says about activations."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from spinlab.cache import Artifact
from spinlab.config import plain
from spinlab.finite import check_finite
from spinlab.model.modules import map_of
from spinlab.rotation.initial import block_orders, stream_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.stages.original import Original
from spinlab.stages.rotations import networks_of
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.tensors import write_tensors

_FILE = "statistics.safetensors"


def statistics(run: Run, original: Original, calibration: Calibration) -> Artifact:
    """Gather statistics of the original's activations, its norms folded if rotations have them so.

    Moments are those of what R1 and R2 give, which are then drawn already.
    """
    config, searches = run.config.rotation, run.config.rotation.searches
    settings, model_map = config.statistics, map_of(original.shape)
    depends = [original.identity, calibration.key, plain(settings), run.config.seed, searches]
    depends.append(config.keeps_gains)
    moments = block_orders(config, model_map) if config.inputs == "wush" else {}
    if moments:
        depends += [config.r1, config.r1_block, config.r2, config.latents, moments]

    def work(out: Path) -> None:
        stream = RotationSet(keeps_gains=config.keeps_gains)
        if moments:
            stream = stream_rotations(config, model_map, run.generator("init"))
        networks = networks_of(run, original)
        network = original.network(
            lambda load: replace(networks, original=load).stream_rotated(stream)
        )
        windows = calibration.windows("statistics", settings.samples, settings.sequence_length)
        found: dict[str, torch.Tensor] = {}
        for part in network.parts(windows.split(1)):
            if map_of(part).sites:
                found |= gather_statistics(part, windows, searches, moments).tensors()
        check_finite(found, "the model is broken, or its activations overflow")
        write_tensors(out / _FILE, found)

    return run.cache.run("statistics", depends, work)


def statistics_in(made: Artifact) -> Statistics:
    """Load what the stage has gathered."""
    return Statistics.from_tensors(load_file(made.path / _FILE))
