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

from spinlab.config import Config, ModelConfig, plain
from spinlab.data.text import fixed_windows, random_windows, read_text, tokenize
from spinlab.device import choose_device
from spinlab.learn.loop import RotationLearner, learn_rotations
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


class Pipeline:
    """Hold what the stages of one experiment share: settings, cache, keys and device."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        self.config, self.on_step = config, on_step
        self.stages = Stages(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)
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
        return self.stages.run("model", depends, lambda out: convert_gguf(model, out))[0]

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

        folder, key = self.stages.run(stage, [source, digests, settings], work)
        return folder / "tokens.safetensors", key

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) calibration windows, the same for the same seed and purpose."""
        name = self.config.data.calibration
        ids = load_file(self.calibration[0])[name]
        return random_windows(ids, length, count, self.generator(purpose), name)

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
            original = self.original()
            dimensions = dimensions_of(original.config)
            rotations = initial_rotations(self.config.rotation, dimensions, self.generator("init"))
            rotations = replace(rotations, about=self.about())
            rotations.save(out / "rotations.safetensors")
            write_json(out / "gate.json", self.gate(original, rotations))

        return self.stages.run("rotate", depends, work)

    def about(self) -> dict[str, Any]:
        """Tell how rotations came to be, for the file that carries them."""
        config = self.config
        return plain({"seed": config.seed, "rotation": config.rotation, "model": self.source})

    def gate(self, original: PreTrainedModel, rotations: RotationSet) -> dict[str, float]:
        """Compare the rotated model with the original and measure orthogonality."""
        ids = self.windows("gate", 1, GATE_TOKENS).to(self.device)
        error = assert_invariant(original, self.networks.rotated(rotations), rotations, ids)
        log.info("%-12s logits differ by %.1e of their spread", "invariance", error)
        return {"logits_error": error, **rotations.orthogonality()}

    @cached_property
    def learned(self) -> tuple[Path, str]:
        """The learned rotations with their curve; the initial ones if nothing is learned."""
        config = self.config
        if config.learn.steps == 0:
            return self.initial
        loop = [config.quant, config.kv, config.weights if config.learn.quantize_weights else None]
        settings = {k: v for k, v in plain(config.learn).items() if k != "save_every"}
        depends = [self.initial[1], self.calibration[1], settings, plain(loop), config.seed]
        folder, key = self.stages.run("learn", depends, self._learn)
        return folder, key

    def _learn(self, out: Path) -> None:
        config = self.config
        start = RotationSet.load(self.initial[0] / "rotations.safetensors")
        model = self.networks.learnable(start)
        learner = RotationLearner(model, start, config.learn, config.quant, config.weights)
        count = config.learn.steps * config.learn.batch
        windows = self.windows("learn", count, config.learn.sequence_length)
        progress = out / "progress.safetensors"
        curve = learner.resume(progress)
        for step, values in enumerate(curve):
            self.on_step(step, values)

        def after_step(step: int, values: dict[str, float]) -> None:
            curve.append(values)
            self.on_step(step, values)
            if (step + 1) % config.learn.save_every == 0:
                learner.save_progress(progress, curve)

        learn_rotations(learner, windows, len(curve), after_step)
        rotations = replace(learner.result(), about={**self.about(), "learn": plain(config.learn)})
        rotations.save(out / "rotations.safetensors")
        save_file(learner.clips(), out / "clips.safetensors")
        write_json(out / "gate.json", self.gate(self.original(), rotations))
        write_json(out / "curve.json", curve)
        progress.unlink(missing_ok=True)

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
        if variant in ("rtn", "init") or self.config.learn.steps == 0:
            return {}
        return load_file(self.learned[0] / "clips.safetensors")

    def _quantize(self, variant: str) -> tuple[Path, str]:
        """Round the rotated weights; `rtn` ignores the experiment's method."""
        config = self.config.weights
        if variant == "rtn":
            config = replace(config, method="rtn")
        rotations, rotation_key = self.rotation_of(variant)
        depends = [self.source, rotation_key, plain(config), plain(self.config.quant.weights)]
        if config.method == "gptq":
            depends += [self.calibration[1], self.config.seed]

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

        folder, key = self.stages.run("weights", depends, work)
        return folder / "weights.safetensors", key
