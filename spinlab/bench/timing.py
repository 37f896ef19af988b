"""Times of short pieces of work: medians of replayed CUDA graphs, or of a clock on a CPU."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]

_CACHES = 3  # copies of what is read fill so many times the L2
_MOST_COPIES = 64
_PASS = 2e-3  # seconds that one replay should take at least
_MOST_PASSES = 50
_ROUNDS = 2  # each figure is taken twice
_WARM_UP = 3  # samples before a round, so that clocks have risen


@dataclass(frozen=True)
class Timing:
    """Hold the seconds of one call.

    spread: how far two medians, taken apart in time, lie from each other, relative to `seconds`
    graph: whether a CUDA graph was replayed; otherwise launches by the host are in the time
    """

    seconds: float
    spread: float
    graph: bool


def copies_for(size: int, device: torch.device) -> int:
    """Return how many copies of `size` bytes calls must walk through to find none in a cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, math.ceil(_CACHES * cache / size)), _MOST_COPIES)


def measure(
    works: Mapping[str, Sequence[Work]], device: torch.device, samples: int = 20
) -> dict[str, Timing]:
    """Time pieces of work side by side: name -> calls that do the same on copies of its operands.

    A sample is the time of one or more passes over the calls of a name, divided by their number.
    Names take turns sample by sample: a GPU that has drawn much power is slower for a while, which
    all of them then share. Then all begin again; a figure is the mean of its two medians.
    """
    clocks = {name: _clock(calls, device) for name, calls in works.items()}
    medians: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_ROUNDS):
        for index in range(_WARM_UP + samples):
            for clock in clocks.values():
                clock.sample(kept=index >= _WARM_UP)
        for name, clock in clocks.items():
            medians[name].append(statistics.median(clock.taken()))
    return {name: _timing(medians[name], clocks[name].graph) for name in works}


def _timing(medians: list[float], graph: bool) -> Timing:
    mean = statistics.mean(medians)
    return Timing(mean, (max(medians) - min(medians)) / mean, graph)


def _clock(calls: Sequence[Work], device: torch.device) -> "HostClock | DeviceClock":
    if device.type != "cuda":
        return HostClock(calls)
    for call in calls:  # kernels compile, peers tune
        call()
    begin, end = _event(), _event()
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize(device)
    passes = math.ceil(_PASS / max(begin.elapsed_time(end) / 1e3, 1e-6))
    return DeviceClock(calls, min(passes, _MOST_PASSES), device)


class HostClock:
    """Time calls by the host's clock."""

    graph = False

    def __init__(self, calls: Sequence[Work]) -> None:
        self.calls = calls
        self.found: list[float] = []

    def sample(self, kept: bool) -> None:
        """Time a pass over the calls."""
        begin = time.perf_counter()
        for call in self.calls:
            call()
        if kept:
            self.found.append((time.perf_counter() - begin) / len(self.calls))

    def taken(self) -> list[float]:
        """Return the seconds of one call, of every sample since the last time."""
        found, self.found = self.found, []
        return found


class DeviceClock:
    """Time calls by events around a CUDA graph of `passes` passes over them.

    What cannot be captured is called by the host instead, and `graph` is False.
    """

    def __init__(self, calls: Sequence[Work], passes: int, device: torch.device) -> None:
        self.calls, self.device = calls, device  # calls own what a graph reads
        self.count = passes * len(calls)

        def run() -> None:
            for _ in range(passes):
                for call in calls:
                    call()

        captured = _captured(calls, run, device)
        self.graph = captured is not None
        self.replay: Work = run if captured is None else captured.replay
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def sample(self, kept: bool) -> None:
        """Time a replay; the host does not wait for it."""
        begin, end = _event(), _event()
        begin.record()
        self.replay()
        end.record()
        if kept:
            self.events.append((begin, end))

    def taken(self) -> list[float]:
        """Return the seconds of one call, of every sample since the last time."""
        torch.cuda.synchronize(self.device)
        found = [begin.elapsed_time(end) / 1e3 / self.count for begin, end in self.events]
        self.events = []
        return found


def _captured(
    calls: Sequence[Work], run: Work, device: torch.device
) -> "torch.cuda.CUDAGraph | None":
    """Return the graph of a run, or None where something in it cannot be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # libraries make their workspaces for a stream once
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            run()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
