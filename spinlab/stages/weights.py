"""Stage `weights`: the rotated weights, rounded by RTN, GPTQ or learned clipping."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import PROGRESS, Artifact
from spinlab.config import WeightsConfig, plain
from spinlab.finite import check_finite
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import networks_of, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration
from spinlab.weights.layerwise import quantize_gptq, quantize_rtn
from spinlab.weights.lwc import quantize_lwc
from spinlab.weights.quantized import QuantizedWeight, load_weights, save_weights

_FILE = "weights.safetensors"


def round_weights(
    run: Run,
    original: Original,
    calibration: Calibration,
    rotated: Artifact | None,
    config: WeightsConfig,
) -> Artifact:
    """Round the weights of the original, or of the rotated model, as `config` says."""
    depends = [original.identity, rotated and rotated.key, config.method, _formats(run)]
    if config.method == "gptq" or config.lwc_epochs:
        depends += [plain(config), calibration.key, run.config.seed]
    else:
        depends.append(config.clip_settings)
    if config.lwc_epochs:
        depends.append(plain(run.config.quant))  # its loss sees quantized inputs

    def work(out: Path) -> None:
        rotations = RotationSet() if rotated is None else rotations_in(run, rotated)
        model = networks_of(run, original).fused(rotations)
        weights = _rounded(run, model, calibration, rotations, config, out / PROGRESS)
        scales = {name: weight.scale for name, weight in weights.items()}
        check_finite(scales, "rounded weights have no scale")
        if parallel.is_main():
            save_weights(weights, out / _FILE)

    return run.cache.run("weights", depends, work, together=config.method == "gptq")


def weights_in(made: Artifact) -> dict[str, QuantizedWeight]:
    """Load what the stage has rounded, by linear."""
    return load_weights(made.path / _FILE)


def _formats(run: Run) -> list[Any]:
    """Name the weight formats, for keys."""
    quant = run.config.quant
    return plain([quant.weights, quant.overrides, quant.head, quant.embedding])


def _rounded(
    run: Run,
    model: PreTrainedModel,
    calibration: Calibration,
    rotations: RotationSet,
    config: WeightsConfig,
    progress: Path,
) -> dict[str, QuantizedWeight]:
    quant = run.config.quant
    if config.method == "rtn" and not config.lwc_epochs:
        return quantize_rtn(model, quant, config, rotations.weight_clips)
    windows = calibration.windows("gptq", config.samples, config.sequence_length)
    work = quantize_gptq if config.method == "gptq" else quantize_lwc
    return work(model, rotations, windows, quant, config, progress)
