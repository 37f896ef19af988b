"""Linears while rotations are learned: their frozen numbers, and the gradients they pass on."""

from collections import deque
from collections.abc import Iterable, Iterator
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

# numbers in the linears that are worked on together: on a GPU few calls count, on a CPU its caches
TOGETHER = {"cpu": 1, "cuda": 1 << 26}


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
        site: Site, module: nn.Linear, format: TensorQuant | None, wide: torch.dtype
    ) -> "LearnedLinear":
        """Keep a linear's weight (out, in), and its bias where that is rotated, and empty them."""
        bias = None
        if module.bias is not None and site.writes is not None:
            bias = module.bias.detach()
            module.bias = nn.Parameter(torch.empty_like(module.bias.data))
        frozen = module.weight.detach()
        room = torch.empty_like(frozen, memory_format=torch.contiguous_format)
        module.weight = nn.Parameter(room)
        return LearnedLinear(site, module, frozen, bias, format, wide)

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
    before rounding, kept only while a gradient of their ranges is awaited.
    """

    linears: list[LearnedLinear]
    owner: int = 0
    clip: torch.Tensor | None = None
    rotated: torch.Tensor | None = None

    @property
    def format(self) -> TensorQuant | None:
        return self.linears[0].format

    @property
    def layers(self) -> list[int]:
        return [linear.site.layer for linear in self.linears]

    @property
    def mine(self) -> bool:
        return self.owner == parallel.rank()

    @property
    def numbers(self) -> int:
        return sum(linear.module.weight.numel() for linear in self.linears)

    def give_to(self, owner: int) -> None:
        """Leave the work to a process; the others forget the frozen numbers."""
        self.owner = owner
        if not self.mine:
            for linear in self.linears:
                linear.frozen = linear.frozen.new_empty(0)

    def weights(self, r1: torch.Tensor | None, r2: torch.Tensor | None) -> torch.Tensor:
        """Return the rotated weights: (n, out, in)."""
        return _stacked([linear.rotate(r1, r2) for linear in self.linears])

    def write(self, weights: torch.Tensor, keep: bool) -> None:
        """Write rotated weights (n, out, in), rounded where they have a format.

        `keep` them for the gradient of their ranges.
        """
        self.rotated = weights if keep and self.format is not None else None
        if self.format is not None:
            assert self.clip is not None
            whole = round_to_nearest(weights, self.format, self.clip)
            weights = whole.dequantize(weights.dtype).view(weights.shape)
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.module.weight.data.copy_(weight)
            linear.module.weight.grad = None

    def begin_share(self, searched: bool) -> list[Work]:
        """Begin to send what the owner wrote, and ratios that it searched, to all processes."""
        sent: list[Work] = []
        if searched and self.format is not None:
            if not self.mine:
                self.clip = torch.empty(self._ratios(self.format), **self._as_rotated())
            assert self.clip is not None
            sent += parallel.begin_share(self.clip, self.owner)
        for linear in self.linears:
            sent += parallel.begin_share(linear.module.weight.data, self.owner)
        return sent

    def _ratios(self, format: TensorQuant) -> tuple[int, int, int, int]:
        rows, width = self.linears[0].module.weight.shape
        return len(self.linears), rows, width // (format.group_size or width), 1

    def _as_rotated(self) -> dict[str, Any]:
        return {"dtype": self.linears[0].wide, "device": self.linears[0].module.weight.device}

    def written(self) -> torch.Tensor:
        """Return the gradient of the written weights (n, out, in), and forget it."""
        return _stacked([linear.gradient() for linear in self.linears])

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
        return gradient, of_clip


def batches_of(linears: list[LearnedLinear]) -> list[LearnedBatch]:
    """Put linears together that stand at one place of their layers and have the same format."""
    groups: dict[tuple, list[LearnedLinear]] = {}
    for linear in linears:
        key = (linear.site.name, linear.format, linear.frozen.shape)
        groups.setdefault(key, []).append(linear)
    found: list[LearnedBatch] = []
    for (*_, shape), group in groups.items():
        some = together(shape.numel(), len(group), group[0].frozen.device.type, parallel.world())
        found += [LearnedBatch(group[i : i + some]) for i in range(0, len(group), some)]
    return found


def together(numbers: int, count: int, device: str, processes: int) -> int:
    """Return how many of `count` linears of so many numbers are a batch; processes have parts."""
    return max(1, min(TOGETHER[device] // numbers, -(-count // processes)))


def share_out(batches: list[LearnedBatch]) -> None:
    """Give every batch, the largest first, to the process that has the fewest numbers so far."""
    given = [0] * parallel.world()
    for batch in sorted(batches, key=lambda batch: -batch.numbers):
        owner = given.index(min(given))
        given[owner] += batch.numbers
        batch.give_to(owner)


def owned_gradients(batches: Iterable[LearnedBatch]) -> Iterator[tuple[LearnedBatch, torch.Tensor]]:
    """Yield this process's batches with the gradients of written weights, over all processes.

    As many sums are under way as there are processes, so that each works while others do.
    """
    under_way: deque[tuple[LearnedBatch, torch.Tensor, list[Work]]] = deque()

    def oldest() -> Iterator[tuple[LearnedBatch, torch.Tensor]]:
        batch, gradient, begun = under_way.popleft()
        for work in begun:
            work.wait()
        if batch.mine:
            yield batch, gradient

    for batch in batches:
        gradient = batch.written()
        under_way.append((batch, gradient, parallel.begin_sum(gradient, batch.owner)))
        if len(under_way) == parallel.world():
            yield from oldest()
    while under_way:
        yield from oldest()


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
