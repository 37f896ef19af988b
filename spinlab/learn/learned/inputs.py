"""Transforms of single inputs while they are learned: scales, rotations in blocks, dual transforms.

`transforms` says what they compute: T of inputs and T* of weights. A scale is folded into what
produces the input, which then multiplies by its inverse (`divide`), but for that of a dual
transform, whose first rotation runs online anyhow.
"""

from collections.abc import Mapping

import torch
from torch import nn

from spinlab.errors import InputError
from spinlab.learn.learned.group import LearnedGroup
from spinlab.learn.learned.log_parameters import LogParameters
from spinlab.learn.learned.transforms import BlockTransform
from spinlab.model.map import Input
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.rotations import RotationSet


def check_inputs(inputs: Mapping[str, ScaledDual], lr_scale: float) -> None:
    """Raise InputError where a transform cannot be learned, or is unlike those of its group."""
    kinds: dict[str, tuple] = {}
    if inputs and not lr_scale and all(transform.dual is None for transform in inputs.values()):
        raise InputError(
            "learn.rotations=[inputs] with learn.lr.scale=0 learns rotations, and inputs have "
            "scales only: set learn.lr.scale, or use rotation.inputs=blocks or duquant"
        )
    for key, transform in inputs.items():
        dual, group = transform.dual, key.partition(".")[2]
        if not isinstance(dual, BlockRotation | None):
            raise InputError(
                f"learn.rotations=[inputs] learns rotations, and input {key} has a map that is "
                "none, of rotation.inputs=wush: use learn=none, or rotation.inputs=blocks"
            )
        kind = transform.folded, dual is None or (type(dual), dual.first.shape[-1])
        if kinds.setdefault(group, kind) != kind:
            raise InputError(
                f"learn.rotations=[inputs] learns transforms of one kind for all {group} inputs, "
                f"and that of {key} is of another: learn on from a file that was learned as one"
            )


class LearnedInputs:
    """Hold the transforms of all inputs, stacked over the layers of a group of linears.

    `parameters` are rotations (layers, k, b, b) by `group.first` and `group.second`; scales, by
    group, are learned if lr_scale > 0.
    """

    def __init__(
        self,
        start: RotationSet,
        inputs: Mapping[str, Input],
        lr_scale: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        check_inputs(start.inputs, lr_scale)
        names = dict.fromkeys(inputs[key].name for key in start.inputs)
        self.groups: dict[str, LearnedGroup] = {}
        for name in names:
            here = [inputs[key] for key in start.inputs if inputs[key].name == name]
            transforms = [start.inputs[input.key] for input in here]
            self.groups[name] = LearnedGroup(here, transforms, start.behind(here[0]), device, dtype)
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{part}": parameter
            for name, group in self.groups.items()
            for part, parameter in group.parameters.items()
        }
        self.transforms: dict[str, BlockTransform] = {}  # T in a step, where it is not empty
        self.producers = {
            input.key: input.producer
            for group in self.groups.values()
            for input in group.inputs
            if group.folded and input.producer is not None
        }
        self._divisors: dict[str, torch.Tensor] = {}  # their logarithms in a step
        self.scales = LogParameters(lr_scale)
        if lr_scale:
            self.scales.start({name: group.scale for name, group in self.groups.items()})

    def begin(self) -> None:
        """Start a step with rotations and scales as they stand, and with gradients of zero."""
        for name, group in self.groups.items():
            learned = self.scales.logs.get(name)
            group.begin(group.scale.log() if learned is None else learned.detach())
            for place, input in enumerate(group.inputs):
                if group.folded:
                    self._divisors[input.key] = group.divisor(place)
                if group.parameters or not group.folded:
                    self.transforms[input.key] = group.transform(place)

    def factor(self, key: str) -> torch.Tensor:
        """Return what the producer of an input is multiplied by: 1 / scale of its rows, (rows,)."""
        return (-self._divisors[key]).exp()

    def divide(self, key: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the producer of an input gives, x (..., rows), over the scale of its rows."""
        return x * self.factor(key).to(x.dtype)

    def of_weights(self, group: str, layers: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Return T*(W) of the weights (n, out, in) of n layers; as they are if T is not learned."""
        if group not in self.groups:
            return weights
        return self.groups[group].of_weights(layers, weights)

    def pull_back(
        self, group: str, layers: list[int], weights: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradients of weights, given those of `of_weights`: (n, out, in) each.

        Those of the transforms gather until `gradients`.
        """
        if group not in self.groups:
            return gradients
        return self.groups[group].pull_back(layers, weights, gradients)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of `parameters`, and leave those of log scales where they step."""
        found: dict[str, torch.Tensor] = {}
        for name, group in self.groups.items():
            of_rotations, of_scale = group.gradients()
            found |= {f"{name}.{part}": gradient for part, gradient in of_rotations.items()}
            if name in self.scales.logs:
                self.scales.logs[name].grad = of_scale
        return found

    def result(self) -> dict[str, ScaledDual]:
        """Return the transforms as they stand, on the host, rotations projected in float64."""
        self.begin()  # the last step has moved the scales
        found: dict[str, ScaledDual] = {}
        for group in self.groups.values():
            keys = (input.key for input in group.inputs)
            found |= zip(keys, group.result(), strict=True)
        return found
