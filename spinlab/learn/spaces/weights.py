"""Learning with quantized weights in the loop: they are rotated and rounded once a step.

Ordinary backpropagation fills the gradients of the rounded weights over all sequences of a batch.
They are pulled back through rounding and rotation once, in closed form. The embedding and the head
stay in their own basis: R1 turns their output and input instead, which is the same function and
touches no vocabulary-sized matrix.
"""

from functools import partial
from typing import cast

import torch
from torch import nn

from spinlab.config import TensorQuant
from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.learn.learned.input_ranges import InputRanges
from spinlab.learn.learned.log_numbers import LogNumbers, part_of
from spinlab.learn.spaces.base import NetworkForm, Parts
from spinlab.learn.spaces.linear import LearnedBatch, LearnedLinear, batches_of
from spinlab.learn.spaces.rotate import turn, turn_back
from spinlab.model.seams import family_of, linear_at, linears_of
from spinlab.rotation.statistics import input_key
from spinlab.weights.rtn import search_ratios


class WeightSpace(NetworkForm):
    """Hold the frozen weights of a network, and write rotated, rounded ones into it each step."""

    def __init__(self, parts: Parts) -> None:
        model, rotations, local = parts.model, parts.rotations, parts.local
        self.rotations = rotations
        self.learn, self.quant, self.search = parts.learn, parts.quant, parts.search
        self.ratios = LogNumbers(self.learn.lr_clip, most=1.0) if self.learn.lr_clip else None
        self.given = parts.clips if self.learn.lr_clip else {}
        self.of_clips: dict[str, torch.Tensor] = {}
        paths: dict[str, InputPath] = {}
        self.linears: list[LearnedLinear] = []
        for name, layer, seam, module in linears_of(model):
            form = self._format(name)
            self.linears.append(LearnedLinear.take(name, layer, seam, module, form, rotations.wide))
            key = input_key(layer, seam.group)
            if seam.reads == "R1" and key not in paths:
                _show(local.watch("r1", layer), module, output=False)
            paths[key] = cast(FakeQuantLinear, module).path
            if seam.writes == "R2":
                _show(local.watch("r2", layer), module, output=True)
        self.paths, self.batches = paths, batches_of(self.linears)
        lr, device = self.learn.lr_input_clip, model.device
        self.input_ranges = InputRanges(paths, lr, device) if lr else None
        if rotations.r1 is not None:
            family = family_of(model.config.model_type)
            for name, into in ((family.embedding, self.enter), (family.final_norm, self.leave)):
                linear_at(model, name).register_forward_hook(partial(_through, into))

    def _format(self, name: str) -> TensorQuant | None:
        """Return the format of a weight that is rounded in the loop."""
        format = self.quant.weights_at(name)
        return format if self.learn.quantize_weights and format.quantizes else None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Take the original's residual stream to this network's: x R1."""
        return self._stream(turn, x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Take this network's residual stream to the original's: x R1ᵀ."""
        return self._stream(turn_back, x)

    def _stream(self, way, x: torch.Tensor) -> torch.Tensor:
        if self.rotations.r1 is None:
            return x
        r1, sink = self.rotations.at("r1", 0), self.rotations.sink("r1", 0)
        return way(x, r1, self.rotations.anchor("r1"), sink)

    @torch.no_grad()
    def begin(self, index: int) -> None:
        """Write every rotated weight into the network, rounded where it has a format."""
        refresh = index % self.learn.clip_refresh == 0
        fresh: dict[str, torch.Tensor] = {}
        rotations, inputs = self.rotations, self.rotations.inputs
        for key, path in self.paths.items():
            if inputs is not None and key in inputs.live:
                path.rotation = inputs.live[key]
        for linear in self.linears:
            linear.turn_bias(rotations.r1, rotations.r2)
        for batch in self.batches:
            weights = batch.weights(rotations.r1, rotations.r2)
            if inputs is not None:
                weights = inputs.of_weights(batch.linears[0].seam.group, batch.layers, weights)
            if batch.format is not None:
                batch.clip = self._clip(batch, batch.format, weights, refresh)
                names = [linear.name for linear in batch.linears]
                fresh |= zip(names, batch.clip.unbind(), strict=True)
            batch.write(weights, keep=self.ratios is not None)
        if self.ratios is not None and not self.ratios.logs:
            self.ratios.start(fresh)

    def _clip(
        self, batch: LearnedBatch, format: TensorQuant, weights: torch.Tensor, refresh: bool
    ) -> torch.Tensor:
        """Return clip ratios: learned, or searched anew, or those of the last search."""
        if self.ratios is not None and self.ratios.logs:
            return torch.stack([self.ratios.number(linear.name) for linear in batch.linears])
        if refresh or batch.clip is None:
            found = search_ratios(weights.flatten(0, 1), format, self.search)
            searched = zip(batch.linears, found.unflatten(0, weights.shape[:2]), strict=True)
            return torch.stack([self.given.get(x.name, ratio).to(ratio) for x, ratio in searched])
        return batch.clip

    def after_backward(self) -> None:
        """Add up the gradients of a micro-batch in float32, where the network has 16 bits."""
        for linear in self.linears:
            linear.widen()

    @torch.no_grad()
    def collect(self) -> None:
        """Hand the rotations their gradients through the weights; keep those of clip ratios."""
        self.of_clips = {}
        rotations, inputs = self.rotations, self.rotations.inputs
        for batch in self.batches:
            gradients, of_clips = batch.gradients()
            if of_clips is not None:
                names = [linear.name for linear in batch.linears]
                self.of_clips |= zip(names, of_clips.unbind(), strict=True)
            if inputs is not None:
                weights = batch.weights(rotations.r1, rotations.r2)
                group = batch.linears[0].seam.group
                gradients = inputs.pull(group, batch.layers, weights, gradients)
            for linear, gradient in zip(batch.linears, gradients, strict=True):
                for space, part in linear.pulled(gradient, rotations.r1, rotations.r2):
                    rotations.add_gradient(space.lower(), linear.layer, part)

    def step(self, rate: float) -> None:
        """Move the clip ratios, if they are learned, at `rate` times their base rate."""
        if self.ratios is not None:
            self.ratios.step(self.of_clips, rate)
        if self.input_ranges is not None:
            self.input_ranges.step(rate)

    def clips(self) -> dict[str, torch.Tensor]:
        """Return the learned clip ratios by linear; none if they were only searched."""
        if self.ratios is None:
            return {}
        return {name: self.ratios.number(name).cpu() for name in self.ratios.logs}

    def input_clips(self) -> dict[str, float]:
        """Return the learned clip ratios of inputs, by `input_key`."""
        return {} if self.input_ranges is None else self.input_ranges.ratios()

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return what is learned beside the rotations and belongs to their file."""
        inputs = {} if self.input_ranges is None else self.input_ranges.numbers.logs
        weights = {} if self.ratios is None else self.ratios.logs
        found = {f"input_ranges.{key}": log.data for key, log in inputs.items()}
        return found | {f"ratios.{name}": log.data for name, log in weights.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs beside the rotations."""
        tensors: dict[str, torch.Tensor] = {}
        for batch in self.batches:
            if batch.clip is not None:
                names = [f"clip.{linear.name}" for linear in batch.linears]
                tensors |= zip(names, batch.clip.unbind(), strict=True)
        if self.ratios is not None:
            tensors |= {f"ratios.{name}": value for name, value in self.ratios.state().items()}
        if self.input_ranges is not None:
            found = self.input_ranges.state()
            tensors |= {f"input_ranges.{name}": value for name, value in found.items()}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        for batch in self.batches:
            names = [f"clip.{linear.name}" for linear in batch.linears]
            if names[0] in tensors:
                batch.clip = torch.stack([tensors[name] for name in names]).to(device)
        if self.ratios is not None:
            self.ratios.load_state(part_of(tensors, "ratios."), device)
        if self.input_ranges is not None:
            self.input_ranges.load_state(part_of(tensors, "input_ranges."), device)


def _through(into, module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return into(out)


def _show(see, module: nn.Module, output: bool) -> None:
    """Let `see` look at what a module reads or writes."""
    if see is None:
        return
    if output:
        module.register_forward_hook(lambda m, args, out: see(out))
    else:
        module.register_forward_pre_hook(lambda m, args: see(args[0]))
