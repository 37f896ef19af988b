"""Transforms of single inputs while they are learned: scales, and dual transforms' rotations.

`transforms` says what they compute: T of inputs and T* of weights. Scales are not folded into what
produces the input: the first rotation runs online anyhow.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from spinlab.errors import InputError
from spinlab.learn.learned.log_parameters import LogParameters
from spinlab.learn.learned.transforms import BlockTransform, scaled, scaled_gradients
from spinlab.learn.optim import on_manifold
from spinlab.model.map import input_key
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import polar


def check_duals(inputs: Mapping[str, ScaledDual]) -> None:
    """Raise InputError where an input has no dual transform that could be learned."""
    for key, transform in inputs.items():
        if transform.dual is None:
            raise InputError(
                f"learn.rotations=[inputs] learns dual transforms, and input {key} has a scale "
                "only: use rotation=duquant"
            )


class _Step:
    """Hold the transforms of a group in one step, stacked over layers, and their gradients.

    inputs is T, weights is T* behind it; of_inputs and of_weights are the gradients of their first
    and second rotations: (layers, k, b, b) each.
    """

    def __init__(self, inputs: BlockTransform, weights: BlockTransform) -> None:
        self.inputs, self.weights = inputs, weights
        self.of_inputs, self.of_weights = (
            [torch.zeros_like(x.first), torch.zeros_like(x.second)] for x in (inputs, weights)
        )

    def leaf(self, place: int) -> BlockTransform:
        """Return T of one layer, whose rotations are leaves that add to `of_inputs`."""
        found = self.inputs.at(place)
        for part, total in zip((found.first, found.second), self.of_inputs, strict=True):
            part.requires_grad_().grad = total[place]
        return found


class LearnedInputs:
    """Hold the transforms of all inputs, stacked over the layers of a group of linears.

    `parameters` are rotations (layers, k, b, b) by `group.first` and `group.second`; scales
    (layers, in) by group are learned if lr_scale > 0.
    """

    def __init__(
        self,
        inputs: Mapping[str, ScaledDual],
        lr_scale: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        check_duals(inputs)
        self.layers: dict[str, list[int]] = {}
        for key in inputs:
            layer, _, group = key.partition(".")
            self.layers.setdefault(group, []).append(int(layer))
        self.parameters: dict[str, nn.Parameter] = {}
        self.permutations: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # with inverses
        self.transforms: dict[str, BlockTransform] = {}  # T in a step, by `input_key`
        self._steps: dict[str, _Step] = {}
        start: dict[str, torch.Tensor] = {}
        for group, layers in self.layers.items():
            here = [inputs[input_key(layer, group)] for layer in layers]
            duals = [dual for transform in here if (dual := transform.dual) is not None]
            for part in ("first", "second"):
                blocks = torch.stack([_blocks(dual, part) for dual in duals])
                self.parameters[f"{group}.{part}"] = on_manifold(blocks.to(device, dtype))
            order = torch.stack([dual.permutation for dual in duals]).to(device)
            self.permutations[group] = order, order.argsort(-1)
            start[group] = torch.stack([_scale(transform) for transform in here]).to(device, dtype)
        self.scales = LogParameters(lr_scale)
        self._fixed = {group: scale.log() for group, scale in start.items()}
        if lr_scale:
            self.scales.start(start)

    def _log_scale(self, group: str) -> torch.Tensor:
        """Return the log scales of a group: (layers, in)."""
        return self.scales.logs.get(group, self._fixed[group]).detach()

    def _rotations(self, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of a group's rotations: (layers, k, b, b) each."""
        stacks = (self.parameters[f"{group}.{part}"] for part in ("first", "second"))
        # geoopt's parameters remember their manifold, what follows does not
        first, second = (stack.as_subclass(torch.Tensor).detach().clone() for stack in stacks)
        return first, second

    def begin(self) -> None:
        """Start a step with rotations and scales as they stand, and with gradients of zero."""
        for group, layers in self.layers.items():
            first, second = self._rotations(group)
            at_input, at_weight = scaled(first, self._log_scale(group))
            order = self.permutations[group]
            step = _Step(
                BlockTransform(at_input, second, *order), BlockTransform(at_weight, second, *order)
            )
            self._steps[group] = step
            for place, layer in enumerate(layers):
                self.transforms[input_key(layer, group)] = step.leaf(place)

    def _behind(self, group: str, layers: list[int]) -> tuple[list[int], BlockTransform]:
        """Return the places of layers in their stack, and a copy of their T*."""
        places = [self.layers[group].index(layer) for layer in layers]
        return places, self._steps[group].weights.at(places)

    def of_weights(self, group: str, layers: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Return T*(W) of the weights (n, out, in) of n layers; as they are if T is not learned."""
        if group not in self.layers:
            return weights
        return self._behind(group, layers)[1](weights)

    def pull_back(
        self, group: str, layers: list[int], weights: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradients of weights, given those of `of_weights`: (n, out, in) each.

        Those of the transforms gather until `gradients`.
        """
        if group not in self.layers:
            return gradients
        places, behind = self._behind(group, layers)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (weights, behind.first, behind.second)]
            made = replace(behind, first=leaves[1], second=leaves[2])(leaves[0])
        found = torch.autograd.grad(made, leaves, gradients.to(weights.dtype))
        for total, part in zip(self._steps[group].of_weights, found[1:], strict=True):
            total[places] += part
        return found[0]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of `parameters`, and leave those of log scales where they step."""
        found: dict[str, torch.Tensor] = {}
        for group, step in self._steps.items():
            point = self._rotations(group)[0], self._log_scale(group)
            firsts, seconds = zip(step.of_inputs, step.of_weights, strict=True)
            found[f"{group}.first"], of_log_scale = scaled_gradients(*point, *firsts)
            found[f"{group}.second"] = seconds[0] + seconds[1]
            if group in self.scales.logs:
                self.scales.logs[group].grad = of_log_scale
        return found

    def result(self) -> dict[str, ScaledDual]:
        """Return the transforms as they stand, on the host, rotations projected in float64."""
        found: dict[str, ScaledDual] = {}
        for group, layers in self.layers.items():
            first, second = (polar(stack).cpu() for stack in self._rotations(group))
            parts = self._log_scale(group).double().exp().cpu(), self.permutations[group][0].cpu()
            for layer, scale, order, *blocks in zip(layers, *parts, first, second, strict=True):
                dual = DualTransform(blocks[0], order, blocks[1])
                found[input_key(layer, group)] = ScaledDual(scale, False, dual)
        return found


def _scale(transform: ScaledDual) -> torch.Tensor:
    return torch.ones(transform.width) if transform.scale is None else transform.scale


def _blocks(dual: DualTransform, part: str) -> torch.Tensor:
    """Return one rotation for every block: (k, b, b), also where all shared one."""
    blocks: torch.Tensor = getattr(dual, part)
    return blocks.expand(dual.width // blocks.shape[-1], -1, -1)
