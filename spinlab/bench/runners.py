"""Whole models to time: the stock one in bfloat16, and the runtime on packed weights."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spinlab.bench.models import DTYPES, random_llama
from spinlab.bench.operands import random_weight
from spinlab.config import KVConfig, QuantConfig
from spinlab.kv.path import kv_path
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import graph_runner, new_cache, runtime_from_packed
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.quantized import Quantized

Online = Callable[[ModelMap], RotationSet]  # what a network runs online, for a model
# torch's attention under a name that no mask function of transformers knows: where a graph is
# captured they would make a mask, and torch's fastest attention takes none
_UNMASKED = "sdpa_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class Setting:
    """Say what is run: a model's name, fewer layers perhaps, prompt and generated tokens.

    method: whose rotations run online, as in conf/method; R3 and R4 alone without one. settings:
    of its rotations and their learning, by dotted names, as they were when it was timed
    """

    model: str
    layers: int | None
    prompt: int
    tokens: int
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Stock:
    """Run the stock model with transformers' static cache."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.model = random_llama(setting.model, setting.layers, device)
        self.device = device

    def prefill(self, ids: torch.Tensor, capacity: int) -> StaticCache:
        """Fill a new cache with a prompt (batch, tokens)."""
        cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def prompter(self, ids: torch.Tensor) -> Callable[[], object]:
        """Return what takes in a prompt (batch, tokens), a captured graph on CUDA."""
        work = functools.partial(self.read, ids)
        return work if self.device.type != "cuda" else _graph(work, lambda: None)

    def read(self, ids: torch.Tensor) -> object:
        """Take in a prompt (batch, tokens), into a new cache; attention is torch's fastest."""
        config = self.model.config
        usual, config._attn_implementation = config._attn_implementation, _UNMASKED
        try:
            return self.model(ids, use_cache=True, logits_to_keep=1)
        finally:
            config._attn_implementation = usual

    def stepper(self, cache: StaticCache, ids: torch.Tensor, filled: int) -> Callable[[], object]:
        """Return one greedy step, a captured graph on CUDA: it feeds itself."""
        capacity = cache.layers[0].max_cache_len  # type: ignore[attr-defined]
        position = torch.full((len(ids), 1), filled, device=self.device)
        slots = torch.arange(capacity, device=self.device)

        def step() -> None:
            mask = (slots <= position[:, :, None])[:, None]
            given = {"past_key_values": cache, "use_cache": True, "position_ids": position}
            logits = self.model(ids, attention_mask=mask, **given).logits
            ids.copy_(logits.argmax(-1))
            position.add_(1)

        lengths: list[Any] = [getattr(layer, "cumulative_length") for layer in cache.layers]  # noqa: B009

        def rewind() -> None:
            position.fill_(filled)
            for length in lengths:
                length.fill_(filled)

        return step if self.device.type != "cuda" else _graph(step, rewind)


def _graph(step: Callable[[], object], rewind: Callable[[], object]) -> Callable[[], object]:
    """Capture a step; `rewind` takes back what one has done."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = step()  # what a pass returns lives as long as its graph
    rewind()
    return functools.partial(_replay, graph, step, kept)


def _replay(graph: torch.cuda.CUDAGraph, *owners: object) -> None:
    """Replay a step; its owners hold tensors that the graph reads and writes."""
    graph.replay()


class Ours:
    """Run the runtime on random packed weights, W4A4KV4 as the experiments have it."""

    def __init__(
        self, setting: Setting, operations: Operations, device: torch.device, online: Online
    ) -> None:
        model = random_llama(setting.model, setting.layers, torch.device("meta"))
        config, rotations = model.config, online(map_of(model))
        generator = torch.Generator(device).manual_seed(0)
        head_dim = config.hidden_size // config.num_attention_heads

        def make(name: str, out: int, width: int, groups: int) -> Any:
            return random_weight(out, width, groups, generator)

        kv = kv_path(KVConfig(), head_dim, rotations.r3)
        parts = Quantized(rotations, {}, QuantConfig(), kv)
        self.model: PreTrainedModel = runtime_from_packed(
            config, make, parts, operations, device, DTYPES[setting.model]
        )

    def prefill(self, ids: torch.Tensor, capacity: int) -> Any:
        """Fill a new cache with a prompt (batch, tokens)."""
        cache = new_cache(self.model, capacity)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def prompter(self, ids: torch.Tensor) -> Callable[[], object]:
        """Return a pass over a prompt (batch, tokens), which the runtime replays on CUDA."""

        runner = graph_runner(self.model)

        def work() -> None:
            runner.prompts = True
            try:
                self.read(ids)
            finally:
                runner.prompts = False

        return work

    def read(self, ids: torch.Tensor) -> object:
        """Take in a prompt (batch, tokens), into a new cache."""
        return self.prefill(ids, ids.shape[1])

    def stepper(self, cache: Any, ids: torch.Tensor, filled: int) -> Callable[[], object]:
        """Return one greedy step, which the runtime replays from a graph on CUDA."""

        def step() -> None:
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits.argmax(-1))

        return step
