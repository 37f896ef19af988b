"""Stage `learn`: rotations learned against the quantized network, with the ranges learned along."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.cache import PROGRESS, Artifact
from spinlab.config import Config, plain
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.learn import (
    Divergence,
    Learnable,
    LearningSpace,
    RotationLearner,
    announce,
    announce_further,
    choose_checkpoint,
    choose_shards,
    in_shards,
    learn_rotations,
    recompute_layers,
    resume,
    save_progress,
    training_of,
)
from spinlab.model.modules import map_of
from spinlab.model.network import Load, as_it_is
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import FILE, gate, networks_of, rotations_in
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration

log = logging.getLogger(__name__)

OnStep = Callable[[int, dict[str, float]], None]

# settings of the learning that its result does not depend on
_APART = ("save_every", "checkpoint", "shard", "max_loss_ratio")


def check_batch(config: Config) -> None:
    """Raise InputError where processes cannot share out a batch evenly."""
    learn, processes = config.learn, parallel.world()
    if learn.steps and learn.batch % (processes * learn.micro_batch):
        raise InputError(
            f"learn.batch={learn.batch} must be a multiple of {processes} processes x "
            f"learn.micro_batch={learn.micro_batch}"
        )


def learns(run: Run, initial: Artifact) -> bool:
    """Tell whether there is anything to learn: steps, and a rotation that is on or ranges alone."""
    learn = run.config.learn
    if not learn.steps:
        return False
    if not learn.rotations:
        return True
    start = rotations_in(run, initial)
    held = [getattr(start, name) for name in learn.rotations]
    if any(isinstance(x, torch.Tensor) or x for x in held):
        return True
    log.info("%-12s nothing: %s are off", "learn", " and ".join(learn.rotations))
    return False


@dataclass(frozen=True)
class Learning:
    """Learn on from initial rotations. further: the file that they come from, if any."""

    run: Run
    original: Original
    calibration: Calibration
    initial: Artifact
    on_step: OnStep
    further: Path | None = None

    def artifact(self) -> Artifact:
        """Return the learned rotations with their curve, as a stage."""
        config = self.run.config
        settings = {k: v for k, v in plain(config.learn).items() if k not in _APART}
        quant = config.quant
        inputs = [o for o in quant.overrides if o.activations.given]
        formats = [quant.activations, quant.o_proj_per_head, inputs, self.original.kv_settings]
        if config.learn.quantize_weights:
            formats += [quant.weights, quant.overrides, config.weights.clip]
        depends = [self.initial.key, self.calibration.key, settings, plain(formats), config.seed]
        depends.append(version("geoopt"))
        return self.run.cache.run("learn", depends, self._work, together=True)

    def _work(self, out: Path) -> None:
        """Learn on all processes, and write what came of it on the first."""
        if self.further is not None:
            start = rotations_in(self.run, self.initial)
            announce_further(start, self.run.config.learn, self.further.name)
        rotations, curve = self._optimize(out)
        if not parallel.is_main():
            return
        gc.collect()  # hooks keep the learner's network, which would stand beside the gate's
        self._described(rotations).save(out / FILE)
        error = gate(self.run, self.original, self.calibration, rotations)
        write_json(out / "gate.json", error)
        write_json(out / "curve.json", curve)

    def _described(self, rotations: RotationSet) -> RotationSet:
        about = {**(rotations.about or {}), **training_of(self.run.config)}
        return replace(rotations, about=about)

    def _optimize(self, out: Path) -> tuple[RotationSet, list[dict[str, float]]]:
        """Run the learning loop; return all that was learned, and the curve."""
        learn = self.run.config.learn
        learner = self.learner()
        count = learn.steps * learn.batch
        windows = self.calibration.windows("learn", count, learn.sequence_length)
        progress = out / PROGRESS / "learn.safetensors"
        curve = resume(learner, progress)
        parallel.barrier()  # all have read it before the first one writes the next
        for step, values in enumerate(curve):
            self.on_step(step, values)

        def after_step(step: int, values: dict[str, float]) -> None:
            curve.append(values)
            self.on_step(step, values)
            due = (step + 1) % learn.save_every == 0 or step + 1 == learn.steps
            if due and parallel.is_main():
                save_progress(learner, progress, curve)

        try:
            learn_rotations(learner, windows, len(curve), after_step)
        except Divergence as error:
            raise self._kept(error, learner, out) from error
        return learner.result(), curve

    def learner(self, space: type[LearningSpace] | None = None) -> RotationLearner:
        """Assemble what is learned on, where it fits; space: another way to compute the same."""
        config, device = self.run.config, self.run.device
        learn, quant = config.learn, config.quant
        expected = choose_shards(self.original.shape, learn, quant, parallel.world(), device)
        checkpoint = choose_checkpoint(expected, learn, device)
        announce(expected, checkpoint, device)
        start = rotations_in(self.run, self.initial)
        found = self._in_shards(start) if expected.shards and space is None else None
        model, teacher, linears = found or self._whole(start, space)
        formats = learn, quant, config.weights.clip
        learner = RotationLearner(model, start, *formats, teacher, space, linears)
        if checkpoint:
            recompute_layers(model)
        return learner

    def _in_shards(self, start: RotationSet) -> Learnable:
        """Return what is learned on, spread over all processes."""
        parts, described = self.original.in_parts, map_of(self.original.shape)
        formats = self.run.config.learn, self.run.config.quant
        return in_shards(parts(partial(self._made, start)), parts(as_it_is), described, *formats)

    def _whole(self, start: RotationSet, space: type[LearningSpace] | None) -> Learnable:
        """Return what is learned on where every process has all of it."""
        learn, quant = self.run.config.learn, self.run.config.quant
        # the network without quantizers is not the original
        apart = learn.rounds(quant) or space is not None
        model = self._made(start, self.original.load)
        needs_teacher = learn.objective.needs_teacher and apart
        return Learnable(model, self.original.load() if needs_teacher else None)

    def _made(self, start: RotationSet, load: Load) -> PreTrainedModel:
        """Make a model, or a part of it, learnable."""
        networks = replace(networks_of(self.run, self.original), original=load)
        return networks.learnable(start, inputs="inputs" in self.run.config.learn.rotations)

    def _kept(self, error: Divergence, learner: RotationLearner, work: Path) -> InputError:
        """Write the last good rotations beside the stage's folder; return an error that names them.

        There are none if the first loss was not sound.
        """
        if not error.last_good:
            return error
        path = work.with_name(f"{work.stem}.diverged.safetensors")
        if parallel.is_main():
            learner.restore(error.last_good)
            self._described(learner.result()).save(path)
        return InputError(f"{error}; the last good rotations are kept: rotation.load={path}")
