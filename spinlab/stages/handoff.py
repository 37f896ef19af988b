"""Stages `handoff-*`: do integers compute what the numbers they stand for do?"""

import json
import logging
from pathlib import Path

from transformers import PreTrainedModel

from spinlab.errors import ResultError
from spinlab.files import write_json
from spinlab.model.network import Load
from spinlab.networks.exact import ExactNetworks
from spinlab.rotation.check import logits_error, logits_of
from spinlab.stages.original import Original
from spinlab.stages.rotations import gate_ids
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.stages.variant import Variant

log = logging.getLogger(__name__)

_LIMIT = 1e-6


class BrokenHandoff(ResultError):
    """Say that integers do not compute what the numbers they stand for do."""


def handoff_error(
    run: Run, original: Original, calibration: Calibration, variant: Variant
) -> float:
    """Return how far a variant's network is from dequantized floats in float64, as a stage.

    The gate of the hand-off: where float noise is too small to flip a level, products of
    dequantized floats and of integers, by kernels or emulated, must give the same logits. The
    result is max|Δlogits| relative to their standard deviation. Raises BrokenHandoff above 1e-6.
    """

    def work(out: Path) -> None:
        settings = run.config.quant, run.config.kv, run.config.seed
        parts = variant.parts(run)
        ids = gate_ids(original, calibration).to(run.device)

        def dequantized(load: Load) -> PreTrainedModel:
            return ExactNetworks(load, *settings).dequantized(*parts)

        def integers(load: Load) -> PreTrainedModel:
            return variant.on_integers(ExactNetworks(load, *settings), run.backend, *parts)

        expected = logits_of(original.network(dequantized), ids)
        error = logits_error(logits_of(original.network(integers), ids), expected)
        log.info("%-12s %s differs by %.1e of the logits' spread", "handoff", variant.name, error)
        if not error <= _LIMIT:
            raise BrokenHandoff(
                f"{variant.name}'s integers are not the numbers they stand for: logits differ by "
                f"{error:.1e} of their spread (limit {_LIMIT:.0e}); runtime.backend=torch "
                "multiplies them exactly"
            )
        write_json(out / "gate.json", {"logits_error": error})

    depends = [*variant.depends(run, original), calibration.key, run.config.seed]
    made = run.cache.run(f"handoff-{variant.name}", depends, work)
    return json.loads((made.path / "gate.json").read_text())["logits_error"]
