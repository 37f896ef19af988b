"""The stages of an experiment up to its networks: load, tokenize, rotate, learn, quantize.

Every stage is cached under a key made of the keys before it, its own settings and the digests of
its inputs (`spinlab.stage`). A second run of the same experiment loads no model at all.
`spinlab.measure` takes over from here.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config, ModelConfig, WeightsConfig, plain
from spinlab.data.text import fixed_windows, random_windows, read_text, tokenize
from spinlab.device import choose_backend, choose_device
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.learn.progress import resume, save_progress
from spinlab.model.load import convert_gguf, load_model, load_tokenizer, source_digest
from spinlab.model.seams import dimensions_of
from spinlab.networks import Networks
from spinlab.rotation.check import assert_invariant
from spinlab.rotation.rotations import RotationSet, initial_rotations
from spinlab.stage import Stages, write_json
from spinlab.weights.layerwise import check_weight_groups, quantize_gptq, quantize_rtn
from spinlab.weights.quantized import save_weights

log = logging.getLogger(__name__)

GATE_TOKENS = 256  # of the invariance gate and of the outlier profile


def clip_settings(config: WeightsConfig) -> dict[str, Any]:
    """Return the settings that RTN depends on: those of its clip search."""
    return {name: value for name, value in plain(config).items() if name.startswith("clip_")}


class Pipeline:
    """Hold what the stages of one experiment share: settings, cache, keys and device."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        self.config, self.on_step = config, on_step
        self.stages = Stages(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)
        self.backend = choose_backend(config.runtime.backend, self.device)
        self.networks = Networks(self.original, config.quant, config.kv)
        self._weights: dict[str, tuple[Path, str]] = {}

    # the model ------------------------------------------------------------------------------

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the original model, for keys."""
        model = self.config.model
        random = model.weights == "random"
        shape = [model.outlier_channels, model.outlier_scale, self.config.seed] if random else None
        return {"digest": source_digest(model), "dtype": model.dtype, "random": shape}

    @cached_property
    def converted(self) -> Path | None:
        """The folder of a packaged model's dequantized checkpoint."""
        model = self.config.model
        if model.weights == "random" or model.path or not model.package:
            return None
        depends = self.source["digest"]
        return self.stages.run("model", depends, lambda out: convert_gguf(model, out), ("model",))[
            0
        ]

    def original(self, model_config: ModelConfig | None = None) -> PreTrainedModel:
        """Return a fresh copy of the original model on the device."""
        model = load_model(model_config or self.config.model, self.converted, self.config.seed)
        return cast(PreTrainedModel, nn.Module.to(model, self.device))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model, self.converted)

    # the text -------------------------------------------------------------------------------

    @cached_property
    def calibration(self) -> tuple[Path, str]:
        """A file with the calibration tokens, and its key."""
        name = self.config.data.calibration

        texts = {name: read_text(name)[0]}
        return self._tokenized("calibration", texts, [], lambda name, ids: ids)

    @cached_property
    def evaluation(self) -> tuple[Path, str]:
        """A file with the evaluation windows of every text, and its key."""
        window, most = self.config.eval.window, self.config.eval.max_windows
        texts = {name: read_text(name)[1] for name in self.config.data.evaluation}

        def windows(name: str, ids: torch.Tensor) -> torch.Tensor:
            return fixed_windows(ids, window, most, name).contiguous()

        return self._tokenized("evaluation", texts, [window, most], windows)

    def _tokenized(
        self,
        stage: str,
        texts: dict[str, str],
        settings: list,
        cut: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> tuple[Path, str]:
        """Keep the tokens of named texts as one file, apart from what else they are used for."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        source = self.source["digest"]  # a model that cannot be had fails here
        tokenizer = self.tokenizer  # and a packaged one is converted, as a stage of its own

        def work(out: Path) -> None:
            rows = {name: cut(name, tokenize(text, tokenizer)) for name, text in texts.items()}
            save_file(rows, out / "tokens.safetensors")

        folder, key = self.stages.run(stage, [source, digests, settings], work, ("data",))
        return folder / "tokens.safetensors", key

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) calibration windows, the same for the same seed and purpose."""
        name = self.config.data.calibration
        ids = load_file(self.calibration[0])[name]
        return random_windows(ids, length, count, self.generator(purpose), f"{name}, for {purpose}")

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    # the rotations --------------------------------------------------------------------------

    @cached_property
    def initial(self) -> tuple[Path, str]:
        """The initial rotations, once they have passed the invariance gate."""
        depends = [self.source, self.calibration[1], plain(self.config.rotation), self.config.seed]

        def work(out: Path) -> None:
            dimensions = dimensions_of(self.original().config)
            rotations = initial_rotations(self.config.rotation, dimensions, self.generator("init"))
            rotations = replace(rotations, about=self.about())
            rotations.save(out / "rotations.safetensors")
            write_json(out / "gate.json", self.gate(rotations))

        return self.stages.run("rotate", depends, work, ("rotation", "model", "quant", "kv"))

    def about(self) -> dict[str, Any]:
        """Tell how rotations came to be, for the file that carries them."""
        config = self.config
        return plain({"seed": config.seed, "rotation": config.rotation, "model": self.source})

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
        formats = [config.quant.activations, config.quant.o_proj_per_head, config.kv]
        if config.learn.quantize_weights:
            formats += [config.quant.weights, clip_settings(config.weights)]
        depends = [self.initial[1], self.calibration[1], settings, plain(formats), config.seed]
        code = ("learn", "rotation", "model", "quant", "kv", "weights", "networks")
        return self.stages.run("learn", depends, self._learn, code)

    @property
    def learns(self) -> bool:
        """Tell whether there is anything to learn: steps, and a rotation that is on."""
        learn, rotation = self.config.learn, self.config.rotation
        return learn.steps > 0 and any(getattr(rotation, r) != "none" for r in learn.rotations)

    def _learn(self, out: Path) -> None:
        rotations, clips, curve = self._optimize(out / "progress.safetensors")
        about = {**self.about(), "learn": plain(self.config.learn)}
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
            config = replace(config, method="rtn")
        rotations, rotation_key = self.rotation_of(variant)
        depends = [self.source, rotation_key, config.method, plain(self.config.quant.weights)]
        if config.method == "gptq":
            depends += [plain(config), self.calibration[1], self.config.seed]
        else:
            depends.append(clip_settings(config))

        def work(out: Path) -> None:
            model = self.networks.fused(rotations)
            check_weight_groups(model, self.config.quant)
            if config.method == "gptq":
                windows = self.windows("gptq", config.samples, config.sequence_length)
                weights = quantize_gptq(
                    model, rotations.r4, windows, self.config.quant, config, out
                )
            else:
                weights = quantize_rtn(model, self.config.quant, config, self._clips(variant))
            save_weights(weights, out / "weights.safetensors")
            for layer in out.glob("layer-*"):
                layer.unlink()

        code = ("weights", "rotation", "model", "quant", "networks")
        folder, key = self.stages.run("weights", depends, work, code)
        return folder / "weights.safetensors", key
