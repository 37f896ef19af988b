"""Batches of linears whose written weights are spread over processes (FSDP2), in shards of rows.

The owner sends every process its rows of what it wrote, and gathers the rows of their gradient,
which FSDP has summed over processes. Shards have the rotations' dtype, in which micro-batches add
up; a layer that is gathered to compute with has the network's.
"""

from typing import cast

import torch
from torch.distributed import Work
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from spinlab import parallel
from spinlab.learn.spaces.linear import LearnedBatch


class SpreadBatch(LearnedBatch):
    """Scatter and gather rows, where those of whole weights are broadcast and summed."""

    def begin_write(self, weights: torch.Tensor | None) -> tuple[torch.Tensor | None, list[Work]]:
        """Begin to send every process its rows of the owner's weights (n, out, in)."""
        room, shares = self._room(), None
        if weights is not None:
            more = self._rows * parallel.world() - weights.shape[1]
            by_rows = pad(weights, (0, 0, 0, more)).unflatten(1, (parallel.world(), -1))
            shares = by_rows.transpose(0, 1).contiguous()
        return room, parallel.begin_scatter(shares, room, self.owner)

    def end_write(self, room: torch.Tensor | None) -> None:
        """Take over rows (n, rows, in), of which the last process may need fewer."""
        assert room is not None
        for linear, rows in zip(self.linears, room, strict=True):
            shard = _local(linear.module.weight)
            shard.copy_(rows[: len(shard)])
            linear.module.weight.grad = None

    def begin_sum(self) -> tuple[torch.Tensor, list[Work]]:
        """Begin to send the owner the rows of the gradient, and forget them."""
        room = self._room()
        for linear, rows in zip(self.linears, room, strict=True):
            shard = _local(linear.gradient())
            rows[: len(shard)] = shard
        rooms = room.new_empty(parallel.world(), *room.shape) if self.mine else None
        sent = parallel.begin_gather(room, rooms, self.owner)
        return room if rooms is None else rooms, sent

    def end_sum(self, room: torch.Tensor) -> torch.Tensor:
        """Return the gradient (n, out, in) that came in rows: (processes, n, rows, in)."""
        out = self.linears[0].module.weight.shape[0]
        return room.transpose(0, 1).flatten(1, 2)[:, :out].contiguous()

    @property
    def _rows(self) -> int:
        """Rows of a shard; the last ones may have fewer, or none."""
        return -(-self.linears[0].module.weight.shape[0] // parallel.world())

    def _room(self) -> torch.Tensor:
        shard = _local(self.linears[0].module.weight)
        return shard.new_empty(len(self.linears), self._rows, shard.shape[1])


def _local(spread: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a weight or gradient that is spread."""
    return cast(DTensor, spread).to_local()
