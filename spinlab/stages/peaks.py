"""Stage `peaks`: rotations with the largest inputs behind them, where a format asks for these.

They are those of the rotated network before anything is rounded, on calibration text.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from spinlab.cache import Artifact
from spinlab.config import plain
from spinlab.fakequant.peaks import input_peaks
from spinlab.files import write_json
from spinlab.finite import check_finite
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import AS_IT_IS
from spinlab.stages.original import Original
from spinlab.stages.rotations import FILE, rotated_network, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration

log = logging.getLogger(__name__)


def peaks(
    run: Run, original: Original, calibration: Calibration, rotated: Artifact | None
) -> Artifact:
    """Return rotations, None for a network without any, together with the peaks of inputs."""
    quant = run.config.quant
    settings = quant.calibration
    formats = [quant.activations, quant.overrides, quant.o_proj_per_head]
    depends = [original.identity, calibration.key, rotated and rotated.key, run.config.seed]
    depends += plain([settings, *formats])

    def work(out: Path) -> None:
        rotations = AS_IT_IS if rotated is None else rotations_in(run, rotated)
        windows = calibration.windows("peaks", settings.samples, settings.sequence_length)
        found: dict[str, float] = {}
        for part in rotated_network(run, original, rotations).parts(windows.split(1)):
            if map_of(part).sites:
                found |= input_peaks(part, windows, quant)
        numbers = {key: torch.tensor(peak) for key, peak in found.items()}
        check_finite(numbers, "the model is broken, or its inputs overflow")
        log.info("%-12s of %d inputs: %.3g to %.3g", "peaks", len(found), *_ends(found))
        replace(rotations, peaks=found).save(out / FILE)
        write_json(out / "peaks.json", found)

    return run.cache.run("peaks", depends, work)


def _ends(found: dict[str, float]) -> tuple[float, float]:
    return min(found.values()), max(found.values())
