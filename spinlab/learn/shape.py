"""What a learning run depends on, by shapes alone, and the bytes of its weights per process."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from spinlab.config import LearnConfig, QuantConfig
from spinlab.device import has_kernels
from spinlab.model.map import ModelMap
from spinlab.model.modules import embedding_of, head_of, layers_of, map_of
from spinlab.model.shares import numbers_read

# sharded layers that are whole at once: one computes, the next one comes, and the room in which the
# one before came is kept until then
_GATHERED = 3


@dataclass(frozen=True)
class Job:
    """Gather what the numbers depend on. rows: sequences of a batch that one process runs."""

    model: PreTrainedModel
    learn: LearnConfig
    quant: QuantConfig
    processes: int
    device: torch.device
    shards: bool

    @property
    def map(self) -> ModelMap:
        return map_of(self.model)

    def read(self, space: str) -> float:
        """Return how many numbers of a token's inputs a rotation (R1, R2, R4) acts on, in all."""
        return sum(self.numbers[input.key] for input in self.map.inputs if input.reads == space)

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Numbers of inputs that are read for a token, by their keys."""
        return numbers_read(self.map)

    @property
    def rounded(self) -> bool:
        return self.learn.rounds(self.quant)

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype while it learns."""
        return getattr(torch, self.learn.dtype) if self.learn.dtype else self.model.dtype

    @property
    def by_kernels(self) -> bool:
        """Tell whether gates and losses have kernels."""
        return has_kernels(self.device, self.dtype)

    @property
    def size(self) -> int:
        """Bytes of a number in that dtype."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in the rotations' dtype."""
        return max(4, self.size)

    @property
    def rows(self) -> int:
        return -(-self.learn.batch // self.processes)

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return min(self.learn.micro_batch, self.rows) * self.learn.sequence_length

    @property
    def layers(self) -> int:
        """Numbers in the weights of all decoder layers."""
        return sum(self._by_layer)

    @property
    def layer(self) -> int:
        """Numbers in the weights of the largest decoder layer."""
        return max(self._by_layer)

    @cached_property
    def _by_layer(self) -> list[int]:
        layers = layers_of(self.model)
        return [sum(p.numel() for p in layer.parameters()) for layer in layers]

    @property
    def embedding(self) -> int:
        return embedding_of(self.model).weight.numel()

    @property
    def head(self) -> int:
        """Numbers in the head; one that is tied to the embedding is untied for learning."""
        return head_of(self.model).weight.numel()


def bytes_of_weights(job: Job) -> int:
    """Return the bytes of the weights, as each space holds them."""
    if job.shards:
        return _in_shards(job)
    whole = (job.layers + job.embedding + job.head) * job.size
    if not job.rounded:
        return whole
    # a 16-bit gradient of several passes is added up in float32
    added = job.size < job.wide and job.rows > job.learn.micro_batch
    gradient = job.size + (job.wide if added else 0)
    teacher = whole if job.learn.objective.needs_teacher else 0
    return whole + teacher + job.layers * gradient + _frozen(job)


def _frozen(job: Job) -> int:
    """Return the bytes of weights that a process rotates and rounds, and as they are rotated."""
    # transforms of inputs make rotated weights twice instead of keeping them
    rotated = job.wide if job.learn.lr.clip and "inputs" not in job.learn.rotations else 0
    return -(-job.layers // job.processes) * (job.model.dtype.itemsize + rotated)


def _in_shards(job: Job) -> int:
    """Return the bytes of weights that are spread, of layers that are gathered, and of the head.

    What is written has shards in the rotations' dtype, as its gradient, which is whole for a layer:
    as the backward pass gives it, and as it is sent. Then a teacher has shards and ends of its own.
    """
    gathered = _GATHERED * job.layer * job.size
    shard, of_ends = (-(-count // job.processes) for count in (job.layers, job.embedding))
    ends = (of_ends + job.embedding + job.head) * job.size
    frozen = shard * job.size + ends
    if not job.rounded:
        return frozen + gathered
    teacher = frozen if job.learn.objective.needs_teacher else 0
    written, gradient = 2 * shard * job.wide + ends, job.layer * (job.size + job.wide)
    return written + gradient + gathered + teacher + _frozen(job)
