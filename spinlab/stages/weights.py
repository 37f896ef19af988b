"""The last stage up to an experiment's networks: quantize the weights.

Every stage is cached under a key made of the keys before it, its own settings and the digests of
its inputs (`spinlab.cache`). A second run of the same experiment loads no model at all.
`run`, `rotate` and `learn` come before, `measure` takes over from here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import PROGRESS
from spinlab.config import Config, WeightsConfig, plain
from spinlab.device import choose_backend
from spinlab.finite import check_finite
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.learn import Learning, clip_settings
from spinlab.weights.layerwise import quantize_gptq, quantize_rtn
from spinlab.weights.lwc import quantize_lwc
from spinlab.weights.quantized import QuantizedWeight, save_weights


class Pipeline(Learning):
    """Add the weights, and with them everything that a network is made of."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        super().__init__(config, on_step)
        self.backend = choose_backend(config.runtime.backend, self.device)
        self._weights: dict[str, tuple[Path, str]] = {}

    def rotation_of(self, variant: str) -> tuple[RotationSet, str]:
        """Return the rotations of a variant, and their key."""
        if variant in ("fp", "rtn"):
            return RotationSet(), "none"
        folder, key = self.initial if variant == "init" else self.learned
        return self.rotations_in(folder), key

    def weights_of(self, variant: str) -> tuple[Path, str]:
        """Return the file of a variant's quantized weights, and its key."""
        if variant not in self._weights:
            self._weights[variant] = self._quantize(variant)
        return self._weights[variant]

    def _quantize(self, variant: str) -> tuple[Path, str]:
        """Round the rotated weights; `rtn` ignores the experiment's method."""
        config = self.config.weights
        if variant == "rtn":
            config = replace(config, method="rtn", lwc_epochs=0)
        rotations, rotation_key = self.rotation_of(variant)
        depends = [self.source, rotation_key, config.method, self._weight_formats()]
        if config.method == "gptq" or config.lwc_epochs:
            depends += [plain(config), self.calibration[1], self.config.seed]
        else:
            depends.append(clip_settings(config))
        if config.lwc_epochs:
            depends.append(plain(self.config.quant))  # its loss sees quantized inputs

        def work(out: Path) -> None:
            model = self.networks.fused(rotations)
            weights = self._rounded(model, rotations, config, out / PROGRESS)
            scales = {name: weight.scale for name, weight in weights.items()}
            check_finite(scales, "rounded weights have no scale")
            if parallel.is_main():
                save_weights(weights, out / "weights.safetensors")

        together = config.method == "gptq"
        folder, key = self.stages.run("weights", depends, work, together)
        return folder / "weights.safetensors", key

    def _weight_formats(self) -> list[Any]:
        """Name the weight formats, for keys."""
        quant = self.config.quant
        return plain([quant.weights, quant.overrides, quant.head, quant.embedding])

    def _rounded(
        self,
        model: PreTrainedModel,
        rotations: RotationSet,
        config: WeightsConfig,
        progress: Path,
    ) -> dict[str, QuantizedWeight]:
        """Round a rotated model's weights by GPTQ, with learned clipping, or to nearest."""
        quant = self.config.quant
        if config.method == "rtn" and not config.lwc_epochs:
            return quantize_rtn(model, quant, config, rotations.weight_clips)
        windows = self.windows("gptq", config.samples, config.sequence_length)
        work = quantize_gptq if config.method == "gptq" else quantize_lwc
        return work(model, rotations, windows, quant, config, progress)
