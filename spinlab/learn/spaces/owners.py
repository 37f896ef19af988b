"""Linears that are rotated and rounded in the loop: which are together, and whose work they are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import LearnConfig, QuantConfig, TensorQuant
from spinlab.fakequant.insert import weight_format
from spinlab.learn.spaces.linear import LearnedBatch, LearnedLinear
from spinlab.learn.spaces.spread import SpreadBatch
from spinlab.model.map import ModelMap, Site
from spinlab.model.modules import linears_of

# numbers in the linears that are worked on together: on a GPU few calls count, on a CPU its caches
TOGETHER = {"cpu": 1, "cuda": 1 << 26}


class Share(NamedTuple):
    """Name linears that one process, the owner, rotates, rounds and differentiates together."""

    sites: list[Site]
    owner: int


class LearnedLinears:
    """Take the linears of a network, whole or a part after the other, and leave each its owner.

    described: the map of the whole; device: where it learns; wide: the dtype that rotations have.
    """

    def __init__(
        self,
        described: ModelMap,
        learn: LearnConfig,
        quant: QuantConfig,
        device: torch.device,
        wide: torch.dtype,
    ) -> None:
        rounds = learn.quantize_weights
        sites = described.sites
        self.wide = wide
        self._formats = {s.path: weight_format(s, quant) if rounds else None for s in sites}
        self._shares = shares_of({site: self._formats[site.path] for site in sites}, device.type)
        self._owners = {site.path: share.owner for share in self._shares for site in share.sites}
        self._taken: dict[str, LearnedLinear] = {}

    def take(self, model: PreTrainedModel) -> list[LearnedLinear]:
        """Take the linears of a model, or of a part, and return them; none has room for a weight.

        Every process takes all, and keeps the numbers of its own.
        """
        found: list[LearnedLinear] = []
        for site, module in linears_of(model):
            mine = self._owners[site.path] == parallel.rank()
            format = self._formats[site.path]
            found.append(LearnedLinear.take(site, module, format, self.wide, mine))
        self._taken |= {linear.site.path: linear for linear in found}
        return found

    def within(self, module: nn.Module) -> list[LearnedLinear]:
        """Return those that are part of a module and have no room for a weight yet."""
        parts = set(module.modules())
        return [x for x in self.all if x.module in parts and x.module.weight.is_meta]

    @property
    def all(self) -> list[LearnedLinear]:
        """All that were taken, in their order."""
        return list(self._taken.values())

    @property
    def spread(self) -> bool:
        """Tell whether the weights that are written are in shards."""
        return any(isinstance(linear.module.weight, DTensor) for linear in self.all)

    def batches(self) -> list[LearnedBatch]:
        """Return the linears as they are worked on, in the same order in all processes."""
        kind = SpreadBatch if self.spread else LearnedBatch
        return [
            kind([self._taken[site.path] for site in share.sites], share.owner)
            for share in self._shares
        ]


def shares_of(formats: Mapping[Site, TensorQuant | None], device: str) -> list[Share]:
    """Put linears together that stand at one place of their layers and have the same format.

    Each share, the largest first, goes to the process that has the fewest numbers so far.
    """
    groups: dict[tuple, list[Site]] = {}
    for site, format in formats.items():
        key = (site.name, format, site.out_features, site.in_features)
        groups.setdefault(key, []).append(site)
    shares: list[list[Site]] = []
    for group in groups.values():
        some = together(group[0].numbers, len(group), device, parallel.world())
        shares += [group[i : i + some] for i in range(0, len(group), some)]
    given, owners = [0] * parallel.world(), [0] * len(shares)
    for index in sorted(range(len(shares)), key=lambda index: -_numbers(shares[index])):
        owners[index] = given.index(min(given))
        given[owners[index]] += _numbers(shares[index])
    return [Share(sites, owner) for sites, owner in zip(shares, owners, strict=True)]


def together(numbers: int, count: int, device: str, processes: int) -> int:
    """Return how many of `count` linears of so many numbers are a batch; processes have parts."""
    return max(1, min(TOGETHER[device] // numbers, -(-count // processes)))


def _numbers(sites: list[Site]) -> int:
    return sum(site.numbers for site in sites)


def owned_gradients(batches: Iterable[LearnedBatch]) -> Iterator[tuple[LearnedBatch, torch.Tensor]]:
    """Yield this process's batches with the gradients of written weights, over all processes.

    As many sums are under way as there are processes, so that each works while others do.
    """

    def begun():
        for batch in batches:
            room, works = batch.begin_sum()
            yield (batch, room), works

    for batch, room in parallel.in_turn(begun(), parallel.world()):
        if batch.mine:
            yield batch, batch.end_sum(room)
