"""The stages of an experiment in order: load, tokenize, rotate, learn, quantize, evaluate, record.

Every stage is cached under a key made of the keys before it, its own settings and the digests of
its inputs (`spinlab.stage`). A second run of the same experiment loads no model at all.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config, plain
from spinlab.data.questions import digest as question_digest
from spinlab.data.text import fixed_windows, random_windows, read_text, tokenize
from spinlab.device import choose_device
from spinlab.evaluate.perplexity import perplexity
from spinlab.evaluate.zeroshot import zeroshot
from spinlab.kv.cache import kv_bits
from spinlab.learn.loop import RotationLearner, learn_rotations
from spinlab.model.load import convert_gguf, load_model, load_tokenizer, source_digest
from spinlab.model.seams import dimensions_of
from spinlab.networks import Networks, channel_peaks, stored_bytes
from spinlab.rotation.check import assert_invariant
from spinlab.rotation.rotations import RotationSet, initial_rotations
from spinlab.stage import Stages, write_json
from spinlab.weights.layerwise import check_weight_groups, quantize_gptq, quantize_rtn
from spinlab.weights.quantized import (
    QuantizedWeight,
    effective_bits,
    load_weights,
    save_weights,
)

log = logging.getLogger(__name__)

_GATE_TOKENS = 256  # of the invariance gate and of the outlier profile


class Pipeline:
    """Hold what the stages of one experiment share: settings, cache, keys and device."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        self.config, self.on_step = config, on_step
        self.stages = Stages(Path(config.paths.cache))
        self.device = choose_device(config.runtime.device)
        self.networks = Networks(self.original, config.quant, config.kv)

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

    def original(self) -> PreTrainedModel:
        """Return a fresh copy of the original model on the device."""
        model = load_model(self.config.model, self.converted, self.config.seed)
        return cast(PreTrainedModel, nn.Module.to(model, self.device))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model, self.converted)

    # the text -------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> tuple[Path, str]:
        """A file with the calibration tokens and the evaluation windows, and its key."""
        data, evaluate = self.config.data, self.config.eval
        names = {data.calibration, *data.evaluation}
        texts = {name: read_text(name) for name in sorted(names)}
        digests = {n: [hashlib.sha256(t.encode()).hexdigest() for t in texts[n]] for n in texts}
        depends = [
            self.source["digest"],
            plain(data),
            digests,
            evaluate.window,
            evaluate.max_windows,
        ]

        def work(out: Path) -> None:
            rows = {"calibration": tokenize(texts[data.calibration][0], self.tokenizer)}
            for name in data.evaluation:
                ids = tokenize(texts[name][1], self.tokenizer)
                windows = fixed_windows(ids, evaluate.window, evaluate.max_windows, name)
                rows[f"evaluation.{name}"] = windows.contiguous()
            save_file(rows, out / "tokens.safetensors")

        folder, key = self.stages.run("tokens", depends, work)
        return folder / "tokens.safetensors", key

    def windows(self, purpose: str, count: int, length: int) -> torch.Tensor:
        """Draw (count, length) calibration windows, the same for the same seed and purpose."""
        with safe_open(self.tokens[0], framework="pt") as file:
            ids = file.get_tensor("calibration")
        return random_windows(
            ids, length, count, self.generator(purpose), self.config.data.calibration
        )

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream per purpose."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    # the rotations --------------------------------------------------------------------------

    @cached_property
    def initial(self) -> tuple[Path, str]:
        """The initial rotations, once they have passed the invariance gate."""
        depends = [self.source, self.tokens[1], plain(self.config.rotation), self.config.seed]

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
        ids = self.windows("gate", 1, _GATE_TOKENS).to(self.device)
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
        depends = [self.initial[1], self.tokens[1], plain(config.learn), plain(loop), config.seed]
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
        """Return the quantized weights of a variant; `rtn` ignores the experiment's method."""
        config = self.config.weights
        if variant == "rtn":
            config = replace(config, method="rtn")
        rotations, rotation_key = self.rotation_of(variant)
        depends = [self.source, rotation_key, plain(config), plain(self.config.quant.weights)]
        if config.method == "gptq":
            depends += [self.tokens[1], self.config.seed]

        def work(out: Path) -> None:
            model = self.networks.fused(rotations)
            check_weight_groups(model, self.config.quant)
            if config.method == "gptq":
                windows = self.windows("gptq", config.samples, config.sequence_length)
                weights = quantize_gptq(
                    model, rotations.r4, windows, self.config.quant, config, out
                )
            else:
                weights = quantize_rtn(model, self.config.quant, config)
            save_weights(weights, out / "weights.safetensors")
            for layer in out.glob("layer-*"):
                layer.unlink()

        folder, key = self.stages.run("weights", depends, work)
        return folder / "weights.safetensors", key

    # the evaluation -------------------------------------------------------------------------

    def evaluate(self, variant: str) -> dict[str, float]:
        """Return a variant's perplexities, accuracies and bytes."""
        config, evaluate = self.config, self.config.eval
        tasks = evaluate.tasks if variant in evaluate.task_variants else []
        depends = [self.source, self.tokens[1], variant, evaluate.batch]
        if variant != "fp":
            depends += [self.weights_of(variant)[1], self.rotation_of(variant)[1]]
            depends += [plain(config.quant), plain(config.kv)]
        if variant == "int4":
            depends.append(config.runtime.backend)
        if tasks:
            packaged = evaluate.task_source == "packaged"
            questions = {t: question_digest(t) if packaged else "hub" for t in tasks}
            depends += [questions, evaluate.limit, evaluate.task_batch]

        def work(out: Path) -> None:
            model, weights = self._network(variant)
            metrics: dict[str, float] = {"bytes": stored_bytes(self.original(), weights)}
            if weights is not None:
                metrics["bits/weights"] = effective_bits(weights)
                metrics["bits/kv"] = kv_bits(model, config.kv)
            for name, windows in self._evaluation_windows().items():
                metrics[f"ppl/{name}"] = perplexity(
                    model, windows, evaluate.batch, f"{variant} {name}"
                )
            if tasks:
                found = zeroshot(
                    model,
                    self.tokenizer,
                    tasks,
                    limit=evaluate.limit,
                    batch_size=evaluate.task_batch,
                    source=cast(Any, evaluate.task_source),
                )
                metrics |= {f"zeroshot/{name}": value for name, value in found.items()}
            write_json(out / "metrics.json", metrics)

        folder, _ = self.stages.run(f"eval-{variant}", depends, work)
        metrics = json.loads((folder / "metrics.json").read_text())
        return {f"{name}/{variant}": value for name, value in metrics.items()}

    def _network(
        self, variant: str
    ) -> tuple[PreTrainedModel, Mapping[str, QuantizedWeight] | None]:
        if variant == "fp":
            return self.original(), None
        rotations, _ = self.rotation_of(variant)
        weights = load_weights(self.weights_of(variant)[0])
        if variant == "int4":
            return self.networks.integer(rotations, weights, self.config.runtime.backend), weights
        return self.networks.fake(rotations, weights), weights

    def _evaluation_windows(self) -> dict[str, torch.Tensor]:
        tokens = load_file(self.tokens[0])
        return {name: tokens[f"evaluation.{name}"] for name in self.config.data.evaluation}

    # the picture ----------------------------------------------------------------------------

    def outliers(self) -> dict[str, torch.Tensor]:
        """Return per network the largest |attention input| of each layer and channel."""
        depends = [self.source, self.tokens[1], self.initial[1], self.learned[1]]

        def work(out: Path) -> None:
            ids = self.windows("gate", 1, _GATE_TOKENS)
            networks = {"before": RotationSet()}
            networks |= {
                "init": self.rotation_of("init")[0],
                "learned": self.rotation_of("fake")[0],
            }
            peaks = {n: channel_peaks(self.networks.rotated(r), ids) for n, r in networks.items()}
            save_file(peaks, out / "peaks.safetensors")

        return load_file(self.stages.run("outliers", depends, work)[0] / "peaks.safetensors")
