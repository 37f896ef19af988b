"""Time a whole model: the stock one in bf16 against the runtime on packed weights of its shapes.

Both draw their weights at random on the device. Decode steps of both run on CUDA graphs over
caches of a fixed size; `bytes/…/peak` is what a prompt and its decode steps allocate at most, with
weights, cache and the logits of the last token.
"""

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from spinlab.bench.clock import now
from spinlab.bench.methods import hadamards
from spinlab.bench.models import DTYPES, random_llama
from spinlab.bench.operands import random_weight
from spinlab.bench.results import Results
from spinlab.config import KVConfig, QuantConfig
from spinlab.errors import InputError
from spinlab.kv.path import kv_path
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import new_cache, runtime_from_packed
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.quantized import Quantized

_REPEATS = 3
Online = Callable[[ModelMap], RotationSet]  # what a network runs online, for a model


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

        return step if self.device.type != "cuda" else _graph(step, cache, position, filled)


def _graph(
    step: Callable[[], object], cache: StaticCache, position: torch.Tensor, filled: int
) -> Callable[[], object]:
    """Capture a step; the cache and the position are put back to where they were."""
    lengths: list[Any] = [getattr(layer, "cumulative_length") for layer in cache.layers]  # noqa: B009

    def rewind() -> None:
        position.fill_(filled)
        for length in lengths:
            length.fill_(filled)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    rewind()
    return functools.partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], object]) -> None:
    """Replay a step; the function itself owns tensors that its graph reads."""
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

    def stepper(self, cache: Any, ids: torch.Tensor, filled: int) -> Callable[[], object]:
        """Return one greedy step, which the runtime replays from a graph on CUDA."""

        def step() -> None:
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits.argmax(-1))

        return step


@torch.no_grad()
def bench_prefill(
    operations: Operations,
    device: torch.device,
    setting: Setting,
    batches: Sequence[int],
    path: Path | None = None,
    online: Online = hadamards,
) -> dict[str, Any]:
    """Return the record of prompts of `setting.prompt` tokens, one model after the other."""
    results = _results("prefill", operations, device, setting, path)
    seconds: dict[str, dict[int, float]] = {}
    for name, runner in _runners(operations, device, setting, online):
        seconds[name] = {}
        for batch in batches:
            ids = _ids(runner.model, batch, setting.prompt, device)
            work = functools.partial(runner.prefill, ids, setting.prompt)
            work()  # kernels compile
            found = [_seconds(work, device) for _ in range(_REPEATS)]
            seconds[name][batch] = statistics.median(found)
            results.add({f"speed/e2e/prefill/b{batch}/{name}": seconds[name][batch]})
            results.add({f"spread/e2e/prefill/b{batch}/{name}": _spread(found)})
        del runner, work
    for batch in batches:
        speedup = seconds["bf16"][batch] / seconds["ours"][batch]
        results.add({f"speedup/e2e/prefill/b{batch}": speedup})
    return results.record()


@torch.no_grad()
def bench_decode(
    operations: Operations,
    device: torch.device,
    setting: Setting,
    batches: Sequence[int],
    path: Path | None = None,
    online: Online = hadamards,
) -> dict[str, Any]:
    """Return the record of `setting.tokens` greedy steps behind a prompt, and of peak memory."""
    results = _results("decode", operations, device, setting, path)
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for name, runner in _runners(operations, device, setting, online):
        found[name] = {}
        for batch in batches:
            case = f"e2e/decode/b{batch}"
            found[name][batch] = _decode(runner, setting, batch, device, results, f"{case}/{name}")
        del runner
    for batch in batches:
        (slow, large), (fast, small) = found["bf16"][batch], found["ours"][batch]
        results.add({f"speedup/e2e/decode/b{batch}": slow / fast})
        if large:
            results.add({f"ratio/e2e/memory/b{batch}": small / large})
    if device.type == "cuda":
        largest = max(batches)
        results.add({"ratio/e2e/memory": results.metrics[f"ratio/e2e/memory/b{largest}"]})
    return results.record()


def _decode(
    runner: Stock | Ours,
    setting: Setting,
    batch: int,
    device: torch.device,
    results: Results,
    case: str,
) -> tuple[float, int]:
    """Return seconds per step, and the bytes allocated at most (0 on a CPU)."""
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    warm_up = 4
    capacity = setting.prompt + setting.tokens + warm_up
    prompt = _ids(runner.model, batch, setting.prompt, device)
    ids = prompt[:, -1:].clone()
    cache = runner.prefill(prompt, capacity)
    step = runner.stepper(cache, ids, setting.prompt)
    for _ in range(warm_up):
        step()

    def run() -> None:
        for _ in range(setting.tokens):
            step()

    seconds = _seconds(run, device) / setting.tokens
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    results.add({f"speed/{case}": seconds, f"speed/{case}/tokens_per_second": batch / seconds})
    if cuda:
        held = torch.cuda.memory_allocated(device)
        results.add({f"bytes/{case}/peak": peak, f"bytes/{case}/held": held})
    return seconds, peak


def _runners(
    operations: Operations, device: torch.device, setting: Setting, online: Online
) -> "Iterator[tuple[str, Stock | Ours]]":
    """Yield the stock model and the runtime, each alone on the device."""
    makers: dict[str, Callable[[], Stock | Ours]] = {
        "bf16": lambda: Stock(setting, device),
        "ours": lambda: Ours(setting, operations, device, online),
    }
    for name, make in makers.items():
        yield name, make()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the device's seconds for some work."""
    start = now(device)
    if device.type != "cuda":
        work()
        return now(device) - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _ids(model: PreTrainedModel, batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=device)


def _spread(found: list[float]) -> float:
    return (max(found) - min(found)) / statistics.median(found)


def _results(
    kind: str, operations: Operations, device: torch.device, setting: Setting, path: Path | None
) -> Results:
    if device.type != "cuda" and setting.model != "toy":
        raise InputError(f"timing {setting.model} needs a CUDA device and this is {device}")
    config = {"operations": operations.name, "device": device.type, **vars(setting)}
    return Results(f"bench/{kind}/{setting.model}", config, path)
