"""Time a whole model: the stock one in bf16 against the runtime on packed weights of its shapes.

Both draw their weights at random on the device. Prompts and decode steps of both run on CUDA
graphs, decode steps over caches of a fixed size; `…/eager` are prompts whose kernels the host
launches. `bytes/…/peak` is what a prompt and its decode steps allocate at most, with weights, cache
and the logits of the last token.
"""

import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spinlab.bench.clock import now
from spinlab.bench.methods import hadamards
from spinlab.bench.results import Results
from spinlab.bench.runners import Online, Ours, Setting, Stock
from spinlab.errors import InputError
from spinlab.runtime.fused.operations import Operations

_REPEATS = 5


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
    seconds: dict[str, dict[str, float]] = {}
    for name, runner in _runners(operations, device, setting, online):
        seconds[name] = {}
        for batch in batches:
            ids = _ids(runner.model, batch, setting.prompt, device)
            eager, captured = functools.partial(runner.read, ids), runner.prompter(ids)
            for case, work in ((f"b{batch}/eager", eager), (f"b{batch}", captured)):
                seconds[name][case], spread = _median(work, device)
                results.add({f"speed/e2e/prefill/{case}/{name}": seconds[name][case]})
                results.add({f"spread/e2e/prefill/{case}/{name}": spread})
        del runner, eager, captured, work
    for case, slow in seconds["bf16"].items():
        results.add({f"speedup/e2e/prefill/{case}": slow / seconds["ours"][case]})
    return results.record()


def _median(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the device's seconds for some work, the median of a few, and how far they spread."""
    for _ in range(2):  # kernels compile, and a graph is captured
        work()
    found = [_seconds(work, device) for _ in range(_REPEATS)]
    median = statistics.median(found)
    return median, (max(found) - min(found)) / median


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


def _results(
    kind: str, operations: Operations, device: torch.device, setting: Setting, path: Path | None
) -> Results:
    if device.type != "cuda" and setting.model != "toy":
        raise InputError(f"timing {setting.model} needs a CUDA device and this is {device}")
    config = {"operations": operations.name, "device": device.type, **vars(setting)}
    return Results(f"bench/{kind}/{setting.model}", config, path)
