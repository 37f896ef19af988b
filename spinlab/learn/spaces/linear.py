"""Linears while rotations are learned: their frozen numbers, and the gradients they pass on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import Work

from spinlab import parallel
from spinlab.config import TensorQuant
from spinlab.formats import format_of
from spinlab.formats.gradient import pull_back
from spinlab.formats.integer import nearest
from spinlab.model.map import Site
from spinlab.rotation.fuse import rotated_weight, rotation_gradients, rotations_at
from spinlab.weights.rtn import round_to_nearest


@dataclass
class LearnedLinear:
    """Keep a linear's frozen numbers, rotate them, and pull gradients back to the rotations.

    frozen: (out, in), empty where another process works with it.
    """

    site: Site
    module: nn.Linear
    frozen: torch.Tensor
    bias: torch.Tensor | None
    format: TensorQuant | None  # None where the weight is not rounded
    wide: torch.dtype  # of what is computed here: that of the rotations
    summed: dict[str, torch.Tensor] = field(default_factory=dict)  # of past micro-batches

    @staticmethod
    def take(
        site: Site, module: nn.Linear, format: TensorQuant | None, wide: torch.dtype, mine: bool
    ) -> "LearnedLinear":
        """Keep a linear's weight (out, in) if it is mine, and its bias where that is rotated.

        The linear is left with an empty bias, and without numbers for a weight (`make_room`).
        """
        bias = None
        if module.bias is not None and site.writes is not None:
            bias = module.bias.detach()
            module.bias = nn.Parameter(torch.empty_like(module.bias.data))
        frozen = module.weight.detach()
        module.weight = nn.Parameter(torch.empty_like(frozen, device="meta"))
        if not mine:
            frozen = frozen.new_empty(0)
        elif frozen.untyped_storage().nbytes() > frozen.nbytes:
            frozen = frozen.clone()  # of a stack, which goes with the last that others work with
        return LearnedLinear(site, module, frozen, bias, format, wide)

    def make_room(self, dtype: torch.dtype) -> None:
        """Give the linear a weight of any numbers."""
        shape, device = self.module.weight.shape, self.frozen.device
        self.module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def rotate(self, r1: torch.Tensor | None, r2: torch.Tensor | None) -> torch.Tensor:
        """Return the rotated weight (out, in), in the rotations' dtype; r1, r2 as they stand."""
        reads, writes = rotations_at(self.site, r1, r2)
        return rotated_weight(self.frozen.to(self.wide), reads, writes)

    def rotate_bias(self, r1: torch.Tensor | None, r2: torch.Tensor | None) -> None:
        """Rotate a bias (out,) in its place, where the linear writes a rotated space."""
        if self.bias is not None:
            _, writes = rotations_at(self.site, r1, r2)
            rotated = rotated_weight(self.bias.to(self.wide)[:, None], None, writes)[:, 0]
            self.module.bias.data.copy_(rotated)
            self.module.bias.grad = None

    def widen(self) -> None:
        """Move the gradients of 16-bit numbers to sums in float32."""
        for name in ("weight", "bias"):
            parameter: nn.Parameter | None = getattr(self.module, name)
            if parameter is None or parameter.grad is None or parameter.dtype.itemsize > 2:
                continue
            known, gradient = self.summed.get(name), parameter.grad
            self.summed[name] = gradient.float() if known is None else known.add_(gradient)
            parameter.grad = None

    def gradient(self, name: str = "weight") -> torch.Tensor:
        """Return the gradient of the written weight, or bias, and forget it."""
        parameter: nn.Parameter = getattr(self.module, name)
        found = self.summed.pop(name, None)
        found = parameter.grad if found is None else found
        if found is None:
            assert self.site.expert is not None  # one that no token came to
            found = torch.zeros_like(parameter)
        parameter.grad = None
        return found.to(self.wide)

    def pulled_back(
        self, gradient: torch.Tensor, r1: torch.Tensor | None, r2: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and gradient of the rotations on both sides, given the weight's: (out, in)."""
        yield from self._sides(self.frozen.to(self.wide), gradient, r1, r2, both=True)

    def bias_pulled_back(
        self, r1: torch.Tensor | None, r2: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and gradient of the rotation behind the bias, if there is one."""
        if self.bias is not None:
            column, of_column = self.bias.to(self.wide)[:, None], self.gradient("bias")[:, None]
            yield from self._sides(column, of_column, r1, r2, both=False)

    def _sides(
        self,
        frozen: torch.Tensor,
        gradient: torch.Tensor,
        r1: torch.Tensor | None,
        r2: torch.Tensor | None,
        both: bool,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        reads, writes = rotations_at(self.site, r1, r2)
        parts = rotation_gradients(frozen, gradient, reads if both else None, writes)
        for name, part in zip((self.site.reads, self.site.writes), parts, strict=True):
            if name is not None and part is not None:
                yield name, part


@dataclass
class LearnedBatch:
    """Linears of one name in several layers, which are rounded and differentiated together.

    One process rotates, rounds and differentiates them, the owner. clip: the ratios
    (n, out, in/g, 1) of n linears, where they are rounded. rotated: the weights (n, out, in)
    before rounding, kept only while a gradient of their ranges is awaited. factors: (n, out, 1),
    what rows are multiplied by while they are rounded, where that decides the levels: what the
    linear gives is multiplied by it afterwards, and in the network that is learned its weight is.
    """

    linears: list[LearnedLinear]
    owner: int = 0
    clip: torch.Tensor | None = None
    rotated: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def format(self) -> TensorQuant | None:
        return self.linears[0].format

    @property
    def layers(self) -> list[int]:
        return [linear.site.layer for linear in self.linears]

    @property
    def mine(self) -> bool:
        return self.owner == parallel.rank()

    def weights(self, r1: torch.Tensor | None, r2: torch.Tensor | None) -> torch.Tensor:
        """Return the rotated weights: (n, out, in)."""
        return _stacked([linear.rotate(r1, r2) for linear in self.linears])

    def carrying(self, weights: torch.Tensor) -> torch.Tensor:
        """Return rotated weights (n, out, in) as they are rounded."""
        return weights if self.factors is None else weights * self.factors

    def rounded(self, weights: torch.Tensor, keep: bool) -> torch.Tensor:
        """Return weights (n, out, in) as `carrying` gives them, rounded where they have a format.

        `keep` them for the gradient of their ranges. The result carries no factors.
        """
        self.rotated = weights if keep and self.format is not None else None
        if self.format is None:
            return weights
        assert self.clip is not None
        whole = round_to_nearest(weights, self.format, self.clip)
        found = whole.dequantize(weights.dtype).view(weights.shape)
        return found if self.factors is None else found / self.factors

    def begin_clip(self) -> list[Work]:
        """Begin to send ratios that the owner searched to all processes."""
        if self.format is None:
            return []
        if not self.mine:
            self.clip = torch.empty(self._ratios(self.format), **self._as_rotated())
        assert self.clip is not None
        return parallel.begin_share(self.clip, self.owner)

    def begin_write(self, weights: torch.Tensor | None) -> tuple[torch.Tensor | None, list[Work]]:
        """Begin to write the owner's weights (n, out, in) into the network of all processes.

        Return what `end_write` takes, and what to wait for before it does.
        """
        sent: list[Work] = []
        for index, linear in enumerate(self.linears):
            if weights is not None:
                linear.module.weight.data.copy_(weights[index])
            linear.module.weight.grad = None
            sent += parallel.begin_share(linear.module.weight.data, self.owner)
        return None, sent

    def end_write(self, room: torch.Tensor | None) -> None:
        """Take over what was sent, if it is not there already."""

    def _ratios(self, format: TensorQuant) -> tuple[int, int, int, int]:
        rows, width = self.linears[0].module.weight.shape
        return len(self.linears), rows, width // (format.group_size or width), 1

    def _as_rotated(self) -> dict[str, Any]:
        return {"dtype": self.linears[0].wide, "device": self.linears[0].module.weight.device}

    def begin_sum(self) -> tuple[torch.Tensor, list[Work]]:
        """Begin to add up the gradient of the written weights at the owner, and forget it.

        Return what `end_sum` takes there, and what to wait for before it does.
        """
        gradient = _stacked([linear.gradient() for linear in self.linears])
        return gradient, parallel.begin_sum(gradient, self.owner)

    def end_sum(self, room: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the written weights: (n, out, in)."""
        return room

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of rotated weights and of log clip ratios, shaped as these are.

        gradient: that of the written weights, (n, out, in).
        """
        of_clip = None
        if self.rotated is not None and self.format is not None and self.clip is not None:
            format, group_size = format_of(self.format), self.format.group_size
            of_rounded = gradient.contiguous()
            gradient, of_clip = pull_back(
                self.rotated, of_rounded, self.clip, format, group_size, nearest, of_rounded
            )
            self.rotated = None
            if self.factors is not None:  # rows of a gradient pass through as they are
                of_clip = of_clip / self.factors[..., None]
        return gradient, of_clip


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
