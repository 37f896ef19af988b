"""The stages of an experiment up to its networks: rotate, learn, quantize.

Every stage is cached under a key made of the keys before it, its own settings and the digests of
its inputs (`spinlab.stage`). A second run of the same experiment loads no model at all.
`spinlab.sources` comes before, `spinlab.measure` takes over from here.
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
from spinlab.errors import InputError
from spinlab.export.transformed import manifest_of
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.learn.progress import resume, save_progress
from spinlab.learn.recipe import training_of, warn_of_mismatch
from spinlab.model.seams import dimensions_of
from spinlab.networks import Networks
from spinlab.rotation.check import assert_invariant
from spinlab.rotation.exchange import read_rotations, with_online
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.sources import Sources
from spinlab.stage import file_digest, write_json
from spinlab.weights.layerwise import check_weight_groups, quantize_gptq, quantize_rtn
from spinlab.weights.lwc import quantize_lwc
from spinlab.weights.quantized import QuantizedWeight, save_weights

log = logging.getLogger(__name__)

GATE_TOKENS = 256  # of the invariance gate and of the outlier profile


def clip_settings(config: WeightsConfig) -> dict[str, Any]:
    """Return the settings that RTN depends on: those of its clip search."""
    return {name: value for name, value in plain(config).items() if name.startswith("clip_")}


class Pipeline(Sources):
    """Add the rotations, the learning and the weights of one experiment to its sources."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        super().__init__(config)
        self.on_step = on_step
        self.backend = choose_backend(config.runtime.backend, self.device)
        self.networks = Networks(self.original, config.quant, config.kv)
        self._weights: dict[str, tuple[Path, str]] = {}

    # the rotations --------------------------------------------------------------------------

    @cached_property
    def given(self) -> Path | None:
        """A file that the rotations come from: a transformed model's manifest, or `load`."""
        rotation, model = self.config.rotation, self.config.model
        manifest = manifest_of(model.path)
        if manifest is None:
            return Path(rotation.load).expanduser() if rotation.load else None
        if rotation.load or self.config.learn.steps:
            raise InputError(
                f"model.path={model.path} holds a transformed model, whose rotations are fused: "
                "leave rotation.load empty and use learn=none"
            )
        log.info("%-12s from the model's transform manifest, rotation.* is not used", "rotations")
        return manifest

    @cached_property
    def statistics(self) -> tuple[Path, str]:
        """A file with what the calibration text says about activations."""
        settings = self.config.rotation.statistics
        depends = [self.source, self.calibration[1], plain(settings), self.config.seed]

        def work(out: Path) -> None:
            model = self.networks.stream_rotated(RotationSet())
            windows = self.windows("statistics", settings.samples, settings.sequence_length)
            found = gather_statistics(model, windows)
            save_file(found.tensors(), out / "statistics.safetensors")

        code = ("rotation", "model", "networks")
        folder, key = self.stages.run("statistics", depends, work, code)
        return folder / "statistics.safetensors", key

    @cached_property
    def initial(self) -> tuple[Path, str]:
        """The initial rotations, once they have passed the invariance gate."""
        config, depends = self.config.rotation, [self.source, self.calibration[1]]
        depends += [plain(replace(config, load=None)), self.config.seed]
        if self.given is not None:
            depends.append(file_digest(self._existing(self.given)))
        elif config.needs_statistics:
            depends.append(self.statistics[1])

        def work(out: Path) -> None:
            rotations = self._start()
            rotations.save(out / "rotations.safetensors")
            write_json(out / "gate.json", self.gate(rotations))

        return self.stages.run("rotate", depends, work, ("rotation", "model", "quant", "kv"))

    @staticmethod
    def _existing(path: Path) -> Path:
        if not path.is_file():
            raise InputError(f"rotation.load={path} does not exist")
        return path

    def _start(self) -> RotationSet:
        """Read the rotations, or draw them, or make them from statistics."""
        config, settings = self.config.rotation, self.original().config
        dimensions = dimensions_of(settings)
        about = self.about(settings.model_type)
        if self.given is None or self.given.suffix == ".bin":
            statistics = None
            if config.needs_statistics:
                statistics = Statistics.from_tensors(load_file(self.statistics[0]))
            generator = self.generator("init")
            drawn = initial_rotations(config, dimensions, generator, statistics, self.device)
            if self.given is None:
                return replace(drawn, about=about)
            loaded = read_rotations(self.given, dimensions, settings.model_type)
            return replace(with_online(loaded, drawn), about={**about, **(loaded.about or {})})
        return read_rotations(self.given, dimensions, settings.model_type)

    def about(self, family: str) -> dict[str, Any]:
        """Tell how rotations came to be, for the file that carries them."""
        config = self.config
        rotation = plain(replace(config.rotation, load=None))
        about = {"seed": config.seed, "rotation": rotation, "model": self.source}
        return plain({**about, "family": family})

    def gate(self, rotations: RotationSet) -> dict[str, float]:
        """Compare the rotated model with the original and measure orthogonality."""
        dtype = "float64" if self.config.model.dtype == "float64" else "float32"
        networks = self.networks_in(dtype)
        ids = self.windows("gate", 1, GATE_TOKENS).to(self.device)
        original, rotated = networks.original(), networks.rotated(rotations)
        error = assert_invariant(original, rotated, rotations, ids)
        log.info("%-12s logits differ by %.1e of their spread", "invariance", error)
        return {"logits_error": error, **rotations.orthogonality()}

    def networks_in(self, dtype: str) -> Networks:
        """Return the same networks in another dtype."""
        model = replace(self.config.model, dtype=dtype)
        return replace(self.networks, original=lambda: self.original(model))

    @cached_property
    def learned(self) -> tuple[Path, str]:
        """The learned rotations with their curve; the initial ones if nothing is learned."""
        config = self.config
        if not self.learns:
            return self.initial
        settings = {k: v for k, v in plain(config.learn).items() if k != "save_every"}
        quant = config.quant
        formats = [quant.activations, quant.o_proj_per_head, quant.overrides, config.kv]
        if config.learn.quantize_weights:
            formats += [quant.weights, clip_settings(config.weights)]
        depends = [self.initial[1], self.calibration[1], settings, plain(formats), config.seed]
        code = ("learn", "rotation", "model", "quant", "kv", "weights", "networks")
        return self.stages.run("learn", depends, self._learn, code)

    @property
    def learns(self) -> bool:
        """Tell whether there is anything to learn: steps, and a rotation that is on."""
        learn = self.config.learn
        if learn.steps == 0:
            return False
        start = RotationSet.load(self.initial[0] / "rotations.safetensors")
        return any(getattr(start, name) is not None for name in learn.rotations)

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
        if variant == "fake":
            warn_of_mismatch(rotations, config)
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

        code = ("weights", "rotation", "model", "quant", "networks")
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
