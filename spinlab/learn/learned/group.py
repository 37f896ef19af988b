"""The transforms that a group of linears (q, k, v; gate, up …) has before it in every layer.

What is learned is stacked over layers, and so are the gradients that gather in a step.
"""

from collections.abc import Sequence

import torch
from torch import nn

from spinlab.learn.learned.transforms import BlockTransform, scaled, scaled_gradients
from spinlab.learn.optim import on_manifold
from spinlab.model.map import Input
from spinlab.rotation.blocks import BlockRotation
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.inputs import ScaledDual, in_gains, of_rows, to_channels, to_rows
from spinlab.rotation.online import OnlineRotation
from spinlab.rotation.orthogonal import polar


class LearnedGroup:
    """Hold the transforms of inputs of one name, one for each layer that has it.

    parameters: rotations (layers, k, b, b) by `first` and `second`, those that there are; scale:
    where scales start: (layers, rows of the producer) if they are folded, else (layers, in). All
    transforms are of one kind; behind: what runs after those that are empty but for their scale.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        transforms: Sequence[ScaledDual],
        behind: OnlineRotation | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.inputs = list(inputs)
        self._places = {input.layer: place for place, input in enumerate(inputs)}
        duals = [t.dual for t in transforms if isinstance(t.dual, BlockRotation)]
        twice = [dual for dual in duals if isinstance(dual, DualTransform)]
        self.rounded = transforms[0].rounded  # as a file brought it: steps take them as they are
        self.folded = transforms[0].folded and inputs[0].producer is not None and not twice
        self.behind = behind if self.folded and not duals else None
        self.parameters: dict[str, nn.Parameter] = {}
        for part, those in (("first", duals), ("second", twice)):
            if those:
                blocks = torch.stack([_blocks(dual, part) for dual in those])
                self.parameters[part] = on_manifold(blocks.to(device, dtype))
        self._order: tuple[torch.Tensor, torch.Tensor] | None = None
        if twice:
            order = torch.stack([dual.permutation for dual in twice]).to(device)
            self._order = order, order.argsort(-1)
        scale = torch.stack([_scale(transform) for transform in transforms])
        self.scale = (to_rows(scale, inputs[0]) if self.folded else scale).to(device, dtype)

    def _rotations(self) -> list[torch.Tensor]:
        """Return copies of the rotations: (layers, k, b, b) each; blocks of 1 where there are none.

        geoopt's parameters remember their manifold, what follows does not.
        """
        stacks = self.parameters.values()
        found = [stack.as_subclass(torch.Tensor).detach().clone() for stack in stacks]
        return found or [self.scale.new_ones(len(self.inputs), self.inputs[0].width, 1, 1)]

    def _channels(self) -> torch.Tensor:
        """Return the log scales of this step: (layers, in)."""
        return to_channels(self._log, self.inputs[0]) if self.folded else self._log

    def _held(self, scales: torch.Tensor) -> torch.Tensor:
        """Return scales as a gain holds them."""
        return in_gains(scales, self.inputs[0].offset)

    def begin(self, log_scale: torch.Tensor) -> None:
        """Start a step with rotations as they stand, and with gradients of zero.

        Scales that are folded are those that a gain holds, as they will be when all is learned.
        """
        self._log = self._held(log_scale.exp()).log().to(log_scale) if self.folded else log_scale
        first, *rest = self._rotations()
        at_input, at_weight = scaled(first, self._channels(), self.folded)
        second, order = rest[0] if rest else None, self._order or (None, None)
        self._of_input = BlockTransform(at_input, second, *order)
        self._of_weight = BlockTransform(at_weight, second, *order, behind=self.behind)
        self._sums = [
            [torch.zeros_like(part) for part in side.rotations]
            for side in (self._of_input, self._of_weight)
        ]
        self._of_divisors = torch.zeros_like(self._log)

    def transform(self, place: int) -> BlockTransform:
        """Return T of one layer, whose rotations are leaves that add to the gradients."""
        found = self._of_input.at(place)
        for part, total in zip(found.rotations, self._sums[0], strict=True):
            part.requires_grad_().grad = total[place]
        return found

    def divisor(self, place: int) -> torch.Tensor:
        """Return the log scale that a producer divides its rows by, a leaf as those above."""
        found = self._log[place].detach().requires_grad_()
        found.grad = self._of_divisors[place]
        return found

    def _behind(self, layers: list[int]) -> tuple[list[int], BlockTransform]:
        """Return the places of layers in their stack, and a copy of their T*."""
        places = [self._places[layer] for layer in layers]
        return places, self._of_weight.at(places)

    def of_weights(self, layers: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Return T*(W) of the weights (n, out, in) of n layers."""
        return self._behind(layers)[1](weights)

    def pull_back(
        self, layers: list[int], weights: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradients of weights, given those of `of_weights`: (n, out, in) each."""
        places, behind = self._behind(layers)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (weights, *behind.rotations)]
            made = behind.with_rotations(leaves[1:])(leaves[0])
        found = torch.autograd.grad(made, leaves, gradients.to(weights.dtype))
        for total, part in zip(self._sums[1], found[1:], strict=True):
            total[places] += part
        return found[0]

    def gradients(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the gradients of `parameters`, by their names, and those of log scales."""
        of_inputs, of_weights = self._sums
        point = self._rotations()[0], self._channels()
        of_first, of_log = scaled_gradients(*point, of_inputs[0], of_weights[0], self.folded)
        if self.folded:
            of_log = of_rows(of_log, self.inputs[0]) + self._of_divisors
        of_second = [a + b for a, b in zip(of_inputs[1:], of_weights[1:], strict=True)]
        return dict(zip(self.parameters, [of_first, *of_second], strict=False)), of_log

    def result(self) -> list[ScaledDual]:
        """Return the transforms of this step, on the host, rotations projected in float64."""
        scales = self._channels().double().exp()
        scales = (self._held(scales) if self.folded else scales).cpu()
        stacks = zip(self.parameters, self._rotations(), strict=False)
        parts = {part: polar(stack).cpu() for part, stack in stacks}
        kind = BlockRotation
        if self._order is not None:
            kind, parts = DualTransform, {**parts, "permutation": self._order[0].cpu()}
        found: list[ScaledDual] = []
        for place, scale in enumerate(scales):
            here = {part: stack[place] for part, stack in parts.items()}
            dual = kind(**here) if here else None
            found.append(ScaledDual(scale, self.folded, dual, self.rounded))
        return found


def _scale(transform: ScaledDual) -> torch.Tensor:
    return torch.ones(transform.width) if transform.scale is None else transform.scale


def _blocks(dual: BlockRotation, part: str) -> torch.Tensor:
    """Return one rotation for every block: (k, b, b), also where all shared one."""
    blocks: torch.Tensor = getattr(dual, part)
    return blocks.expand(dual.width // blocks.shape[-1], -1, -1)
