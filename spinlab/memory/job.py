"""What the needs of stages depend on: a model's shape, settings, and the stages that are left."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import Config
from spinlab.fakequant.insert import rounded_sites, token_quantizer
from spinlab.formats import format_of
from spinlab.model.layer import Dimensions
from spinlab.model.map import ModelMap
from spinlab.model.modules import embedding_of, map_of
from spinlab.rotation.initial import block_orders

HALF, FLOAT32, FLOAT64, INDEX, LEVEL = 2, 4, 8, 8, 2  # bytes; levels of weights are int16
MORE = "a machine with more memory"


@dataclass(frozen=True)
class Need:
    """Tell what a stage holds at once: bytes in the host's memory and on the device.

    stage: as sentences call it; name: what it is in the cache, or `load` or `export`.
    """

    stage: str
    host: int
    device: int
    cure: str
    name: str


@dataclass(frozen=True)
class Job:
    """Gather what the needs depend on.

    shape: the original on the meta device. remaining: the stages that are not in the cache, by
    their names there; those that are take nothing. processes: that work together. words: of each
    evaluation text, if they are known, each of which is taken to be a token or more. transformed:
    the model has its rotations in its weights.
    """

    config: Config
    shape: PreTrainedModel
    device: torch.device
    remaining: Collection[str]
    processes: int = field(default_factory=parallel.launched)
    words: Sequence[int] = ()
    transformed: bool = False

    def has(self, *stages: str) -> bool:
        """Tell whether one of these stages has still to run."""
        return any(stage in self.remaining for stage in stages)

    @property
    def size(self) -> int:
        """Bytes of a number in the model's dtype."""
        return getattr(torch, self.config.model.dtype).itemsize

    @property
    def gate_size(self) -> int:
        """Bytes of a number in the invariance gate."""
        return max(self.size, FLOAT32)

    @property
    def map(self) -> ModelMap:
        return map_of(self.shape)

    @property
    def dimensions(self) -> Dimensions:
        return self.map.dimensions

    @cached_property
    def numbers(self) -> int:
        """Numbers of the checkpoint, where embedding and head may be one."""
        return sum(p.numel() for p in self.shape.parameters())

    @cached_property
    def end(self) -> int:
        """Numbers of the embedding, and of the head."""
        return embedding_of(self.shape).weight.numel()

    @cached_property
    def untied(self) -> int:
        """Numbers of a rotated model, whose head is its own."""
        return self.numbers + (self.end if self.shape.config.tie_word_embeddings else 0)

    @cached_property
    def linears(self) -> dict[str, int]:
        """Numbers of the linears that are quantized, by path."""
        rounded = rounded_sites(self.map, self.config.quant)
        return {site.path: site.numbers for site, _ in rounded}

    @cached_property
    def on_integers(self) -> frozenset[str]:
        """The paths of linears whose weights and inputs have levels that fit into a byte."""
        quantizers = (
            (site.path, format, token_quantizer(self.map, site, self.config.quant))
            for site, format in rounded_sites(self.map, self.config.quant)
        )
        return frozenset(
            path
            for path, format, inputs in quantizers
            if inputs is not None and inputs.format.is_int8 and format_of(format).is_int8
        )

    @cached_property
    def rest(self) -> int:
        """Numbers of a rotated model that nothing rounds; a tied matrix makes both ends."""
        quant = self.config.quant
        ends = quant.head.quantizes + quant.embedding.quantizes + 2 * quant.tied.quantizes
        return self.untied - sum(self.linears.values()) - ends * self.end

    @cached_property
    def before_last(self) -> int:
        """Numbers of the first layer's linears, but for the last one."""
        return sum([site.numbers for site in self.map.sites if site.layer == 0][:-1])

    @cached_property
    def fusing(self) -> int:
        """What fusing the largest matrix takes beside the model."""
        return 2 * FLOAT64 * max(self.end, *(w.numel() for w in self.shape.parameters()))

    @property
    def offload(self) -> bool:
        """Tell whether layers come one by one."""
        return self.config.runtime.offload

    @property
    def loads_shards(self) -> bool:
        """Tell whether processes may load the network that is learned on by shards of its layers.

        They do so from files: random weights are there as a whole before they are spread.
        """
        spread = self.processes > 1 and self.config.learn.shard != "off"
        return spread and self.config.model.weights != "random"

    @property
    def loads_no_whole(self) -> bool:
        """Tell whether they do so however much memory there is."""
        learn = self.config.learn
        return self.loads_shards and (learn.shard == "on" or not learn.rounds(self.config.quant))

    @cached_property
    def layer(self) -> int:
        """Numbers of the largest layer."""
        layers = (self.shape.get_submodule(layer.path) for layer in self.map.layers)
        return max(sum(p.numel() for p in layer.parameters()) for layer in layers)

    @property
    def part(self) -> int:
        """Numbers of a rotated model that are there at once."""
        return max(self.layer, 2 * self.end) if self.offload else self.untied

    @cached_property
    def largest(self) -> int:
        """Numbers of the largest matrix of a layer."""
        layers = (self.shape.get_submodule(layer.path) for layer in self.map.layers)
        return max(p.numel() for layer in layers for p in layer.parameters())

    @property
    def r1(self) -> int:
        """Bytes of R1, where there may be one."""
        config = self.config.rotation
        return 0 if config.r1 == "none" and not config.load else FLOAT64 * self.map.hidden**2

    def made(self, size: int, fusing: bool = True, replaced: bool = False) -> int:
        """Bytes of a network in numbers of so many bytes while it is made, with R1 if in parts.

        replaced: the linears of layers get other weights, and take the gains of norms alone.
        """
        if not self.offload:
            return self.untied * size + self.fusing * fusing
        beside = (2 * FLOAT64 * self.largest, 2 * FLOAT64 * self.end) if fusing else (0, 0)
        of_layer = self.layer * size + beside[0] + self.r1 * (not replaced)
        return max(of_layer, 2 * self.end * size + beside[1] + self.r1)

    @cached_property
    def passing(self) -> int:
        """Bytes of the host's memory that a layer takes on its way to another device.

        It is moved from where it lies in its file, whose pages the system takes back, and widened
        there. Experts that lie apart in it are stacked, gates and ups apart and then together.
        """
        if self.device.type == "cpu":
            return 0
        found: dict[int, int] = {}
        for site in self.map.sites:
            if site.expert is not None:
                found[site.layer] = found.get(site.layer, 0) + site.numbers
        return HALF * max(found.values(), default=0) * 5 // 3

    @cached_property
    def unpacked(self) -> int:
        """Bytes of the levels of a layer's linears where they are not packed."""
        return LEVEL * max(self._by_layer.values(), default=0)

    @cached_property
    def taken_out(self) -> int:
        """Bytes of the largest linear's levels as they are unpacked, from bytes to int16."""
        return (1 + LEVEL) * max(self.linears.values(), default=0)

    @cached_property
    def stacked(self) -> int:
        """Bytes of the levels of those linears that read one input, and are one product."""
        found: dict[tuple, int] = {}
        for site, _ in rounded_sites(self.map, self.config.quant):
            found[site.rows] = found.get(site.rows, 0) + LEVEL * site.numbers
        return max(found.values(), default=0)

    @property
    def _by_layer(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for site, _ in rounded_sites(self.map, self.config.quant):
            found[site.layer] = found.get(site.layer, 0) + site.numbers
        return found

    @property
    def levels(self) -> int:
        """Quantized weights in the host's memory, as stages pass them on: packed with offload."""
        return self.packed if self.offload else LEVEL * sum(self.linears.values())

    @cached_property
    def packed(self) -> int:
        """Bytes of the levels of quantized weights as they are stored."""
        rounded = rounded_sites(self.map, self.config.quant)
        return sum(site.numbers * format.bits // 8 for site, format in rounded)

    @cached_property
    def statistics(self) -> dict[int, int]:
        """Bytes of what activations are like, by layer.

        A search keeps the mean of every input of a window, WUSH the second moments of blocks.
        """
        rotation, length = self.config.rotation, self.config.rotation.statistics.sequence_length
        found = dict.fromkeys(range(len(self.map.layers)), 0)
        if rotation.searches:
            for input in self.map.inputs:
                found[input.layer] += length * input.width * FLOAT32
            for site in self.map.sites:
                if site.writes == "R2":
                    found[site.layer] += length * site.out_features * FLOAT32
        if rotation.inputs == "wush":
            for key, order in block_orders(rotation, self.map).items():
                input = self.map.input_at[key]
                found[input.layer] += 2 * FLOAT64 * input.width * order
        return found

    @property
    def windows(self) -> int:
        """Windows of all evaluation texts, if these are as long as `eval.max_windows` says.

        Where it says nothing one of each, for a shorter text is refused.
        """
        return len(self.config.data.evaluation) * (self.config.eval.max_windows or 1)

    @property
    def windows_by_text(self) -> list[int]:
        """Windows of each evaluation text at least; of one that is not known those of `windows`."""
        most, length = self.config.eval.max_windows, self.config.eval.window
        known = [max(words // length, 1) for words in self.words]
        if not known:
            return [most or 1] * len(self.config.data.evaluation)
        return [count if most is None else min(count, most) for count in known]

    def cure(self, *more: str) -> str:
        """Name what helps: what a stage has, and what every stage has."""
        dtype = [f"model.dtype=bfloat16 instead of {self.config.model.dtype}"]
        named = [*more, *(dtype if self.size > 2 else []), "a smaller model"]
        return f"{', '.join(named)} or {MORE}"
