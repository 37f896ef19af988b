"""The last stages up to an experiment's networks: learn the rotations, quantize the weights.

Every stage is cached under a key made of the keys before it, its own settings and the digests of
its inputs (`spinlab.stage`). A second run of the same experiment loads no model at all.
`spinlab.sources` and `spinlab.start` come before, `spinlab.measure` takes over from here.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spinlab.config import Config, WeightsConfig, plain
from spinlab.device import choose_backend
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.learn.progress import resume, save_progress
from spinlab.learn.recipe import training_of
from spinlab.rotation.rotations import RotationSet
from spinlab.stage import write_json
from spinlab.start import SETTINGS, Start
from spinlab.weights.layerwise import check_weight_groups, quantize_gptq, quantize_rtn
from spinlab.weights.lwc import quantize_lwc
from spinlab.weights.quantized import QuantizedWeight, save_weights

log = logging.getLogger(__name__)


def clip_settings(config: WeightsConfig) -> dict[str, Any]:
    """Return the settings that RTN depends on: those of its clip search."""
    return {name: value for name, value in plain(config).items() if name.startswith("clip_")}


class Pipeline(Start):
    """Add the learning and the weights, and with them everything that a network is made of."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        super().__init__(config)
        self.on_step = on_step
        self.backend = choose_backend(config.runtime.backend, self.device)
        self._weights: dict[str, tuple[Path, str]] = {}

    # the rotations --------------------------------------------------------------------------

    @cached_property
    def learned(self) -> tuple[Path, str]:
        """The learned rotations with their curve; the initial ones if nothing is learned."""
        config = self.config
        if not self.learns:
            return self.initial
        settings = {k: v for k, v in plain(config.learn).items() if k != "save_every"}
        quant = config.quant
        inputs = [o for o in quant.overrides if "activations" in o]
        formats = [quant.activations, quant.o_proj_per_head, inputs, config.kv]
        if config.learn.quantize_weights:
            formats += [quant.weights, quant.overrides, clip_settings(config.weights)]
        depends = [self.initial[1], self.calibration[1], settings, plain(formats), config.seed]
        code = ("learn", "rotation", "model", "quant", "kv", "weights", "networks", *SETTINGS)
        return self.stages.run("learn", depends, self._learn, code)

    @cached_property
    def learns(self) -> bool:
        """Tell whether there is anything to learn: steps, and a rotation that is on."""
        learn = self.config.learn
        if learn.steps == 0:
            return False
        start = RotationSet.load(self.initial[0] / "rotations.safetensors")
        if any(getattr(start, name) is not None for name in learn.rotations):
            return True
        log.info("%-12s nothing: %s are off", "learn", " and ".join(learn.rotations))
        return False

    def _learn(self, out: Path) -> None:
        rotations, clips, curve = self._optimize(out / "progress.safetensors")
        about = {**(rotations.about or {}), **training_of(self.config)}
        replace(rotations, about=about).save(out / "rotations.safetensors")
        save_file(clips, out / "clips.safetensors")
        write_json(out / "gate.json", self.gate(rotations))
        write_json(out / "curve.json", curve)
        (out / "progress.safetensors").unlink(missing_ok=True)

    def _optimize(
        self, progress: Path
    ) -> tuple[RotationSet, dict[str, torch.Tensor], list[dict[str, float]]]:
        """Run the learning loop; return rotations, learned clip ratios and the curve."""
        config = self.config
        start = RotationSet.load(self.initial[0] / "rotations.safetensors")
        network = self.networks.learnable(start)
        learner = RotationLearner(network, start, config.learn, config.quant, config.weights)
        count = config.learn.steps * config.learn.batch
        windows = self.windows("learn", count, config.learn.sequence_length)
        curve = resume(learner, progress)
        for step, values in enumerate(curve):
            self.on_step(step, values)

        def after_step(step: int, values: dict[str, float]) -> None:
            curve.append(values)
            self.on_step(step, values)
            if (step + 1) % config.learn.save_every == 0:
                save_progress(learner, progress, curve)

        learn_rotations(learner, windows, len(curve), after_step)
        return learner.result(), learner.clips(), curve

    # the weights ----------------------------------------------------------------------------

    def rotation_of(self, variant: str) -> tuple[RotationSet, str]:
        """Return the rotations of a variant, and their key."""
        if variant in ("fp", "rtn"):
            return RotationSet(), "none"
        folder, key = self.initial if variant == "init" else self.learned
        return RotationSet.load(folder / "rotations.safetensors"), key

    def weights_of(self, variant: str) -> tuple[Path, str]:
        """Return the file of a variant's quantized weights, and its key."""
        if variant not in self._weights:
            self._weights[variant] = self._quantize(variant)
        return self._weights[variant]

    def _clips(self, variant: str) -> dict[str, torch.Tensor]:
        """Return the clip ratios that were learned together with a variant's rotations, if any."""
        if variant in ("rtn", "init") or not self.learns:
            return {}
        return load_file(self.learned[0] / "clips.safetensors")

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
            check_weight_groups(model, self.config.quant)
            weights = self._rounded(model, rotations, config, self._clips(variant), out)
            save_weights(weights, out / "weights.safetensors")
            for layer in out.glob("layer-*"):
                layer.unlink()

        code = ("weights", "rotation", "model", "quant", "networks", *SETTINGS)
        folder, key = self.stages.run("weights", depends, work, code)
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
        clips: dict[str, torch.Tensor],
        progress: Path,
    ) -> dict[str, QuantizedWeight]:
        """Round a rotated model's weights by GPTQ, with learned clipping, or to nearest."""
        quant = self.config.quant
        if config.method == "rtn" and not config.lwc_epochs:
            return quantize_rtn(model, quant, config, clips)
        windows = self.windows("gptq", config.samples, config.sequence_length)
        work = quantize_gptq if config.method == "gptq" else quantize_lwc
        return work(model, rotations, windows, quant, config, progress)
