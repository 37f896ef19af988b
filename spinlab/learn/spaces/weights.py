"""Learning with quantized weights in the loop: they are rotated and rounded once a step.

Ordinary backpropagation fills the gradients of the rounded weights over all sequences of a batch.
They are pulled back through rounding and rotation once, in closed form. The embedding and the head
stay in their own basis: R1 rotates their output and input instead, which is the same function and
touches no vocabulary-sized matrix.
"""

from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed import Work
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import TensorQuant
from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.formats import format_of
from spinlab.learn.learned import (
    LearnedInputs,
    LogParameters,
    learn_input_ranges,
    learn_kv_ranges,
    part_of,
)
from spinlab.learn.spaces.base import LearningSpace, Parts
from spinlab.learn.spaces.gates import fuse_gates
from spinlab.learn.spaces.heads import learn_heads
from spinlab.learn.spaces.linear import LearnedBatch
from spinlab.learn.spaces.owners import LearnedLinears, owned_gradients
from spinlab.learn.spaces.rotate import rotate, rotate_back
from spinlab.model.load import ExactNorm
from spinlab.model.modules import linears_of, map_of
from spinlab.model.shares import watched
from spinlab.weights.rtn import search_ratios, starting_ratios

Begun = tuple[LearnedBatch, torch.Tensor | None]  # with what its `end_write` takes


class WeightSpace(LearningSpace):
    """Hold the frozen weights of a network, and write rotated, rounded ones into it each step."""

    def __init__(self, parts: Parts) -> None:
        model, rotations, local = parts.model, parts.rotations, parts.local
        super().__init__(parts)
        self.search = parts.search
        self.ranges = LogParameters(self.learn.lr.clip, most=1.0)  # of weights, by linear
        self.given = parts.clips if self.learn.lr.clip else {}
        paths: dict[str, InputPath] = {}  # of quantized inputs, by their keys
        self.readers: dict[InputPath, str] = {}  # the keys of all
        self.divided: dict[str, str] = {}  # keys of inputs by producers that their scales divide
        whole = watched(map_of(model))
        linears = parts.linears or self._taken(parts)
        self.linears, self.batches = linears.all, linears.batches()
        # whole weights have their places; those in shards wait for them beside
        self.most_begun = parallel.world() if linears.spread else len(self.batches)
        for site, module in linears_of(model):
            if site.reads == "R1" and whole[site.key] == site.path:
                _show(local.watch("r1", site.layer), module, output=False)
            path = cast(FakeQuantLinear, module).path
            if site.quantized:
                paths.setdefault(site.key, path)
            self.readers.setdefault(path, site.key)
            if site.writes == "R2":
                _show(local.watch("r2", site.layer), module, output=True)
        self._fold(model)
        lr = self.learn.lr.input_clip
        self.input_ranges = learn_input_ranges(paths if lr else {}, lr, model.device)
        lr = self.learn.lr.kv_clip
        self.kv_ranges = learn_kv_ranges(model, lr) if lr else LogParameters(lr)
        learn_heads(model, rotations)  # around codecs, whatever their ranges
        if rotations.r1 is not None:
            ends = map_of(model)
            for path, into in ((ends.embedding, self.enter), (ends.final_norm, self.leave)):
                model.get_submodule(path).register_forward_hook(partial(_through, into))

    def _fold(self, model: PreTrainedModel) -> None:
        """Divide what producers of inputs give by folded scales, in their own kernels or behind."""
        inputs = self.rotations.inputs
        if inputs is None:
            fuse_gates(model, {})
            return
        self.divided = {path: key for key, path in inputs.producers.items()}
        factors = {path: partial(inputs.factor, key) for path, key in self.divided.items()}
        inside = fuse_gates(model, factors)
        for path, key in self.divided.items():
            producer = model.get_submodule(path)
            if isinstance(producer, ExactNorm):
                producer.factor = factors[path]
            elif path not in inside:
                divide = partial(inputs.divide, key)
                producer.register_forward_hook(partial(_through, divide))

    def _taken(self, parts: Parts) -> LearnedLinears:
        """Take the linears of a network that is there as a whole, with room for whole weights."""
        model, wide = parts.model, self.rotations.wide
        linears = LearnedLinears(map_of(model), self.learn, parts.quant, model.device, wide)
        for linear in linears.take(model):
            linear.make_room(linear.frozen.dtype)
        return linears

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Take the original's residual stream x (..., hidden) to this network's: x R1."""
        return self._stream(rotate, x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Take this network's residual stream x (..., hidden) to the original's: x R1ᵀ."""
        return self._stream(rotate_back, x)

    def _stream(self, way, x: torch.Tensor) -> torch.Tensor:
        if self.rotations.r1 is None:
            return x
        r1, sink = self.rotations.at("r1", 0), self.rotations.sink("r1", 0)
        return way(x, r1, self.rotations.anchor("r1"), sink)

    @torch.no_grad()
    def begin(self, index: int) -> None:
        """Write every rotated weight into the network, rounded where it has a format."""
        refresh = index % self.learn.clip_refresh == 0
        rotations, inputs = self.rotations, self.rotations.inputs
        for path, key in self.readers.items():
            if inputs is not None and key in inputs.transforms:
                path.rotation = inputs.transforms[key]
        for linear in self.linears:
            linear.rotate_bias(rotations.r1, rotations.r2)
        begun = (self._begin(batch, refresh) for batch in self.batches)
        for batch, room in parallel.in_turn(begun, self.most_begun):
            batch.end_write(room)
        if self.learn.lr.clip and not self.ranges.logs:
            self.ranges.start(self._clips())

    def _begin(self, batch: LearnedBatch, refresh: bool) -> tuple[Begun, list[Work]]:
        """Begin to write a batch; refresh: with ratios that are searched anew."""
        search = not self.ranges.logs and (refresh or batch.clip is None)
        if batch.format is not None and self.ranges.logs:
            ratios = [self.ranges.value(linear.site.path) for linear in batch.linears]
            batch.clip = torch.stack(ratios)
        written = self._written(batch, search) if batch.mine else None
        sent = batch.begin_clip() if search else []
        room, works = batch.begin_write(written)
        return (batch, room), sent + works

    def _written(self, batch: LearnedBatch, search: bool) -> torch.Tensor:
        """Rotate and round the weights of a batch: (n, out, in)."""
        inputs = self.rotations.inputs
        weights = batch.weights(self.rotations.r1, self.rotations.r2)
        if inputs is not None:
            weights = inputs.of_weights(batch.linears[0].site.input, batch.layers, weights)
            batch.factors = self._factors(batch, inputs)
        weights = batch.carrying(weights)
        if batch.format is not None and search:
            batch.clip = self._searched(batch, batch.format, weights)
        # transforms of inputs need them again, and make them anew
        return batch.rounded(weights, keep=self.learn.lr.clip > 0 and inputs is None)

    def _factors(self, batch: LearnedBatch, inputs: LearnedInputs) -> torch.Tensor | None:
        """Return 1 / scale of the inputs that a batch produces: (n, out, 1).

        None where it produces none, or rounds to the same levels without.
        """
        keys = [self.divided.get(linear.site.path) for linear in batch.linears]
        if batch.format is None or format_of(batch.format).homogeneous:
            return None
        factors = [inputs.factor(key) for key in keys if key is not None]
        assert len(factors) in (0, len(keys)), "linears of one name produce the same, or nothing"
        return torch.stack(factors)[..., None] if factors else None

    def _searched(
        self, batch: LearnedBatch, format: TensorQuant, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return clip ratios (n, out, in/g, 1) that suit the weights, or those that were given."""
        ratios_of = starting_ratios if self.learn.lr.clip else search_ratios
        found = ratios_of(weights.flatten(0, 1), format, self.search)
        searched = zip(batch.linears, found.unflatten(0, weights.shape[:2]), strict=True)
        pairs = ((self.given.get(x.site.path, ratio), ratio) for x, ratio in searched)
        return torch.stack([given.to(ratio) for given, ratio in pairs])

    def _clips(self) -> dict[str, torch.Tensor]:
        """Return the clip ratios that weights are rounded with, by linear."""
        found: dict[str, torch.Tensor] = {}
        for batch in self.batches:
            if batch.clip is not None:
                names = [linear.site.path for linear in batch.linears]
                found |= zip(names, batch.clip.unbind(), strict=True)
        return found

    def after_backward(self) -> None:
        """Add up the gradients of a micro-batch in float32, where the network has 16 bits."""
        for linear in self.linears:
            linear.widen()

    @torch.no_grad()
    def collect(self) -> None:
        """Hand the rotations and the clip ratios their gradients through the weights."""
        rotations, inputs = self.rotations, self.rotations.inputs
        for linear in self.linears:
            for name, part in linear.bias_pulled_back(rotations.r1, rotations.r2):
                rotations.add_gradient(name.lower(), linear.site.layer, part)
        for batch, of_written in owned_gradients(self.batches):
            group, weights = batch.linears[0].site.input, None
            if inputs is not None:
                weights = batch.weights(rotations.r1, rotations.r2)
                if self.learn.lr.clip and batch.format is not None:
                    rotated = inputs.of_weights(group, batch.layers, weights)
                    batch.rotated = batch.carrying(rotated)
            gradients, of_ranges = batch.gradients(of_written)
            if of_ranges is not None:
                for linear, of_range in zip(batch.linears, of_ranges, strict=True):
                    self.ranges.logs[linear.site.path].grad = of_range
            if inputs is not None and weights is not None:
                gradients = inputs.pull_back(group, batch.layers, weights, gradients)
            for linear, gradient in zip(batch.linears, gradients, strict=True):
                for name, part in linear.pulled_back(gradient, rotations.r1, rotations.r2):
                    rotations.add_gradient(name.lower(), linear.site.layer, part)

    def step(self, rate: float) -> None:
        """Move the clip ratios, if they are learned, at `rate` times their base rate."""
        self.ranges.step(rate)
        self.input_ranges.step(rate)
        self.kv_ranges.step(rate)

    def clips(self) -> dict[str, torch.Tensor]:
        """Return the learned clip ratios by linear; none if they were only searched."""
        return {name: self.ranges.value(name).cpu() for name in self.ranges.logs}

    def input_clips(self) -> dict[str, float]:
        """Return the learned clip ratios of inputs, by their keys."""
        return {key: self.input_ranges.value(key).item() for key in self.input_ranges.logs}

    def kv_clips(self) -> dict[str, float]:
        """Return the learned clip ratios of keys and values, by layer and side."""
        return {key: self.kv_ranges.value(key).item() for key in self.kv_ranges.logs}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return what is learned beside the rotations and belongs to their file."""
        return {
            f"{kind}.{name}": log.data
            for kind, ranges in self._ranges().items()
            for name, log in ranges.logs.items()
        }

    def _ranges(self) -> dict[str, LogParameters]:
        return {
            "input_ranges": self.input_ranges,
            "kv_ranges": self.kv_ranges,
            "ranges": self.ranges,
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs beside the rotations."""
        tensors = {f"clip.{path}": ratios for path, ratios in self._clips().items()}
        for kind, ranges in self._ranges().items():
            tensors |= {f"{kind}.{name}": value for name, value in ranges.state().items()}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        for batch in self.batches:
            names = [f"clip.{linear.site.path}" for linear in batch.linears]
            if names[0] in tensors:
                batch.clip = torch.stack([tensors[name] for name in names]).to(device)
        for kind, ranges in self._ranges().items():
            ranges.load_state(part_of(tensors, f"{kind}."), device)


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
