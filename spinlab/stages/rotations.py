"""Rotations between stages: how they are read, and the gate that they pass."""

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from spinlab.cache import Artifact
from spinlab.config import ModelConfig
from spinlab.model.context import context_of
from spinlab.model.network import Load, Network, as_it_is
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.check import GATE_TOKENS, check_invariance
from spinlab.rotation.ranges import with_fitting_ranges
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration

log = logging.getLogger(__name__)

FILE = "rotations.safetensors"


def rotations_in(run: Run, made: Artifact) -> RotationSet:
    """Load a stage's rotations, with those of their learned ranges that fit the formats."""
    config = run.config
    found = RotationSet.load(made.path / FILE)
    return with_fitting_ranges(found, config.quant, config.kv, config.weights.method)


def networks_of(run: Run, original: Original) -> RotatedNetworks:
    """Return what assembles rotated networks from copies of the original."""
    return RotatedNetworks(original.load, run.config.quant, run.config.kv, run.config.seed)


def gate(
    run: Run, original: Original, calibration: Calibration, rotations: RotationSet
) -> dict[str, float]:
    """Compare the rotated model with the original and measure orthogonality."""
    dtype = "float64" if original.settings.dtype == "float64" else "float32"
    settings = replace(original.settings, dtype=dtype)
    ids = gate_ids(original, calibration).to(run.device)
    rotated = rotated_network(run, original, rotations, settings)
    error = check_invariance(original.network(as_it_is, settings), rotated, rotations, ids)
    log.info("%-12s logits differ by %.1e of their spread", "invariance", error)
    return {"logits_error": error, **rotations.orthogonality()}


def rotated_network(
    run: Run, original: Original, rotations: RotationSet, settings: ModelConfig | None = None
) -> Network:
    """Return the rotated network. settings: of a model with another dtype."""
    networks = networks_of(run, original)

    def make(load: Load) -> PreTrainedModel:
        return replace(networks, original=load).rotated(rotations)

    return original.network(make, settings)


def gate_ids(original: Original, calibration: Calibration) -> torch.Tensor:
    """Return one calibration window: (1, gate_tokens)."""
    return calibration.windows("gate", 1, gate_tokens(original))


def gate_tokens(original: Original) -> int:
    """Return how many tokens the gates look at: no more than the model's context."""
    return min(GATE_TOKENS, context_of(original.shape.config) or GATE_TOKENS)
