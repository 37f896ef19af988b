"""Stage `statistics`: what the calibration text says about activations."""

from pathlib import Path

from safetensors.torch import load_file

from spinlab.cache import Artifact
from spinlab.config import plain
from spinlab.finite import check_finite
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.stages.original import Original
from spinlab.stages.rotations import networks_of
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.tensors import write_tensors

_FILE = "statistics.safetensors"


def statistics(run: Run, original: Original, calibration: Calibration) -> Artifact:
    """Gather statistics of the original's activations, its norms folded."""
    settings, searches = run.config.rotation.statistics, run.config.rotation.searches
    depends = [original.identity, calibration.key, plain(settings), run.config.seed, searches]

    def work(out: Path) -> None:
        model = networks_of(run, original).stream_rotated(RotationSet())
        windows = calibration.windows("statistics", settings.samples, settings.sequence_length)
        found = gather_statistics(model, windows, searches).tensors()
        check_finite(found, "the model is broken, or its activations overflow")
        write_tensors(out / _FILE, found)

    return run.cache.run("statistics", depends, work)


def statistics_in(made: Artifact) -> Statistics:
    """Load what the stage has gathered."""
    return Statistics.from_tensors(load_file(made.path / _FILE))
