"""The third part of an experiment's stages: rotations learned against the quantized network."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spinlab import parallel
from spinlab.config import Config, WeightsConfig, plain
from spinlab.errors import InputError
from spinlab.files import write_json
from spinlab.learn.announce import announce
from spinlab.learn.estimate import choose_checkpoint, estimate
from spinlab.learn.form import NetworkForm, Parts
from spinlab.learn.guard import Divergence
from spinlab.learn.loop import RotationLearner, learn_rotations, rounds_weights
from spinlab.learn.placement import recompute_layers, shard_layers
from spinlab.learn.progress import resume, save_progress
from spinlab.learn.recipe import announce_further, training_of
from spinlab.rotation.rotations import RotationSet
from spinlab.stage import PROGRESS
from spinlab.start import SETTINGS, Start

log = logging.getLogger(__name__)

# settings of the learning that its result does not depend on
_APART = ("save_every", "checkpoint", "max_loss_ratio")


def clip_settings(config: WeightsConfig) -> dict[str, Any]:
    """Return the settings that RTN depends on: those of its clip search."""
    return {name: value for name, value in plain(config).items() if name.startswith("clip_")}


class Learning(Start):
    """Add the learned rotations, with the ranges learned together with them."""

    def __init__(self, config: Config, on_step: Callable[[int, dict], None]) -> None:
        super().__init__(config)
        self.on_step = on_step
        learn, processes = config.learn, parallel.world()
        if learn.steps and learn.batch % (processes * learn.micro_batch):
            raise InputError(
                f"learn.batch={learn.batch} must be a multiple of {processes} processes x "
                f"learn.micro_batch={learn.micro_batch}"
            )

    @cached_property
    def learned(self) -> tuple[Path, str]:
        """The learned rotations with their curve; the initial ones if nothing is learned."""
        config = self.config
        if not self.learns:
            return self.initial
        if self.given is not None:
            announce_further(self.rotations_in(self.initial[0]), config.learn, self.given.name)
        settings = {k: v for k, v in plain(config.learn).items() if k not in _APART}
        quant = config.quant
        inputs = [o for o in quant.overrides if "activations" in o]
        formats = [quant.activations, quant.o_proj_per_head, inputs, config.kv]
        if config.learn.quantize_weights:
            formats += [quant.weights, quant.overrides, clip_settings(config.weights)]
        depends = [self.initial[1], self.calibration[1], settings, plain(formats), config.seed]
        depends.append(version("geoopt"))
        code = ("learning", "learn", "rotation", "model", "quant", "kv", "weights", "networks")
        code = (*code, "parallel", *SETTINGS)
        return self.stages.run("learn", depends, self._learn, code, together=True)

    @cached_property
    def learns(self) -> bool:
        """Tell whether there is anything to learn: steps, and a rotation that is on."""
        learn = self.config.learn
        if learn.steps == 0:
            return False
        start = self.rotations_in(self.initial[0])
        held = [getattr(start, name) for name in learn.rotations]
        if any(isinstance(x, torch.Tensor) or x for x in held):
            return True
        log.info("%-12s nothing: %s are off", "learn", " and ".join(learn.rotations))
        return False

    def _learn(self, out: Path) -> None:
        """Learn on all processes, and write what came of it on the first."""
        rotations, curve = self._optimize(out)
        if not parallel.is_main():
            return
        gc.collect()  # hooks keep the learner's network, which would stand beside the gate's
        self._described(rotations).save(out / "rotations.safetensors")
        write_json(out / "gate.json", self.gate(rotations))
        write_json(out / "curve.json", curve)

    def _described(self, rotations: RotationSet) -> RotationSet:
        return replace(rotations, about={**(rotations.about or {}), **training_of(self.config)})

    def _optimize(self, out: Path) -> tuple[RotationSet, list[dict[str, float]]]:
        """Run the learning loop; return all that was learned, and the curve."""
        learn = self.config.learn
        learner = self.learner()
        windows = self.windows("learn", learn.steps * learn.batch, learn.sequence_length)
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

    def learner(self, form: Callable[[Parts], NetworkForm] | None = None) -> RotationLearner:
        """Assemble what is learned on, where it fits; form: another way to compute the same."""
        config = self.config
        learn, processes = config.learn, parallel.world()
        start = self.rotations_in(self.initial[0])
        network = self.networks.learnable(start, inputs="inputs" in learn.rotations)
        expected = estimate(network, learn, config.quant, processes)
        checkpoint = choose_checkpoint(expected, learn, self.device)
        announce(expected, checkpoint, self.device)
        rounded = rounds_weights(learn, config.quant)
        apart = rounded or form is not None  # the network without quantizers is not the original
        teacher = self.original() if learn.objective.needs_teacher and apart else None
        formats = learn, config.quant, config.weights
        learner = RotationLearner(network, start, *formats, teacher=teacher, form=form)
        if checkpoint:
            recompute_layers(network)
        if not apart:
            shard_layers(network)
        return learner

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
