"""One linear while rotations are learned: its frozen numbers, and the gradients they pass on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from spinlab.config import TensorQuant
from spinlab.learn.ranges import rounding_gradient
from spinlab.model.seams import Seam
from spinlab.rotation.fuse import rotated_weight, rotation_gradients, rotations_at
from spinlab.weights.rtn import round_to_nearest


@dataclass
class LearnedLinear:
    """Write rotated numbers into a linear and pull their gradients back to the rotations.

    format is None where the weight is not rounded. clip: its ratios (out, in/g, 1), where it is.
    rotated: the weight before rounding, kept only while a gradient of its range is awaited.
    """

    name: str
    module: nn.Linear
    seam: Seam
    layer: int
    frozen: torch.Tensor
    bias: torch.Tensor | None
    format: TensorQuant | None
    clip: torch.Tensor | None = None
    rotated: torch.Tensor | None = None

    @staticmethod
    def take(
        name: str, layer: int, seam: Seam, module: nn.Linear, format: TensorQuant | None
    ) -> "LearnedLinear":
        """Keep a linear's weight, and its bias where rotations turn it; leave room in its place."""
        bias = None
        if module.bias is not None and seam.writes is not None:
            bias = module.bias.detach().float()
            module.bias = nn.Parameter(torch.empty_like(module.bias.data))
        frozen = module.weight.detach().float()
        module.weight = nn.Parameter(torch.empty_like(module.weight.data))
        return LearnedLinear(name, module, seam, layer, frozen, bias, format)

    def rotate(self, r1: torch.Tensor | None, r2: torch.Tensor | None) -> torch.Tensor:
        """Return the rotated weight, in float32; a bias is turned in its place at once."""
        reads, writes = rotations_at(self.seam, self.layer, r1, r2)
        if self.bias is not None:
            turned = rotated_weight(self.bias[:, None], None, writes)[:, 0]
            self.module.bias.data.copy_(turned)
            self.module.bias.grad = None
        return rotated_weight(self.frozen, reads, writes)

    def write(self, weight: torch.Tensor, keep: bool) -> None:
        """Write a rotated weight, rounded where it has a format; `keep` it for the backward."""
        self.rotated = weight if keep and self.format is not None else None
        if self.format is not None:
            assert self.clip is not None
            weight = round_to_nearest(weight, self.format, self.clip).dequantize()
        self.module.weight.data.copy_(weight)
        self.module.weight.grad = None

    def gradients(
        self, r1: torch.Tensor | None, r2: torch.Tensor | None
    ) -> tuple[list[tuple[str, torch.Tensor]], torch.Tensor | None]:
        """Return (space, gradient) of the rotations on both sides, and of the log clip ratios."""
        assert self.module.weight.grad is not None
        gradient, of_clip = self.module.weight.grad.float(), None
        if self.rotated is not None and self.format is not None and self.clip is not None:
            gradient, of_clip = rounding_gradient(self.rotated, gradient, self.format, self.clip)
            self.rotated = None
        found = list(self._pulled(self.frozen, gradient, r1, r2, both=True))
        if self.bias is not None:
            of_bias = self.module.bias.grad
            assert of_bias is not None
            columns = self.bias[:, None], of_bias.float()[:, None]
            found += self._pulled(*columns, r1, r2, both=False)
        self.module.weight.grad = None
        return found, of_clip

    def _pulled(
        self,
        frozen: torch.Tensor,
        gradient: torch.Tensor,
        r1: torch.Tensor | None,
        r2: torch.Tensor | None,
        both: bool,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        reads, writes = rotations_at(self.seam, self.layer, r1, r2)
        parts = rotation_gradients(frozen, gradient, reads if both else None, writes)
        for space, part in zip((self.seam.reads, self.seam.writes), parts, strict=True):
            if space is not None and part is not None:
                yield space, part
