"""One decode step as a CUDA graph: replayed, it costs the host one launch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.slots import SlotPool

_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position")
_USUAL = {"use_cache": (True,), "return_dict": (True,), "logits_to_keep": (0, 1)}
# what a pass looks up in the model's config, where its caller does not say
_LOOKED_UP = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")
_WARM_UPS = 2  # passes before the capture: kernels compile and libraries take their workspaces

Step = Callable[[IntegerCache], torch.Tensor]


class DecodeGraph:
    """Hold a captured step for the slots of one cache, with the tensors it reads and writes.

    ids, positions  (batch, 1) int64
    logits          (batch, 1, vocabulary)
    """

    def __init__(
        self, forward: Callable[..., Any], cache: IntegerCache, stream: torch.cuda.Stream | None
    ) -> None:
        slots, before = cache.slots, cache.filled
        self.ids = torch.zeros(slots.batch, 1, dtype=torch.int64, device=slots.start.device)
        self.positions = torch.zeros_like(self.ids)

        def step(cache: IntegerCache) -> torch.Tensor:
            filled = cache.filled
            inputs = {"input_ids": self.ids, "position_ids": self.positions}
            logits = forward(**inputs, past_key_values=cache, use_cache=True).logits
            cache.filled = filled  # replays count for themselves
            return logits

        try:
            # neither step nor cache is kept: a graph outlives the cache it was captured with
            self.run, self.logits = capture(step, cache, stream)
        except BaseException:
            cache.rewind(before)
            raise

    def replay(
        self, ids: torch.Tensor, positions: torch.Tensor | None, cache: IntegerCache
    ) -> torch.Tensor:
        """Run a step on new ids (batch, 1); return a copy of its logits (batch, 1, vocabulary)."""
        self.ids.copy_(ids)
        # without positions tokens count from the first slot, as in the stock model
        self.positions.copy_(cache.slots.length if positions is None else positions)
        self.run()
        cache.filled += 1
        return self.logits.clone()


def capture(
    step: Step, cache: IntegerCache, stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], torch.Tensor]:
    """Return what replays a step on a cache's slots, and the tensor it leaves its result in."""
    assert stream is not None, "graphs are captured on a stream of their own"
    main = torch.cuda.current_stream()
    stream.wait_stream(main)
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step(cache)
                cache.rewind(cache.filled)
    finally:  # what a step that broke off has begun still writes into the cache
        main.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step(cache)  # nothing runs yet
    return graph.replay, result


class GraphRunner:
    """Take a model's forward passes: a decode step goes to its graph, all else to the stock pass.

    enabled: a switch; `capturable` says whether the model's operations allow graphs at all.
    A deep copy of a model has a runner of its own: `stock`, being bound, is bound to the copy.
    """

    def __init__(self, model: PreTrainedModel, pool: SlotPool, capturable: bool) -> None:
        functools.update_wrapper(self, model.forward)  # generate() reads its signature
        self.model, self.pool, self.stock = model, pool, model.forward
        self.capturable, self.enabled = capturable, True
        # one stream for warm-up and capture: kernels keep workspaces per stream
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not self.takes(kwargs):
            return self.stock(*args, **kwargs)
        cache: IntegerCache = kwargs["past_key_values"]
        if cache.tokens:  # the last pass broke off
            cache.rewind(cache.filled)
        cache.check_window(cache.filled + 1)
        slots = cache.slots
        # outside of inference mode, so that its tensors can be written in any mode
        with torch.inference_mode(False), torch.no_grad():
            if slots.graph is None:
                if self.stream is None and slots.start.is_cuda:
                    self.stream = torch.cuda.Stream()
                slots.graph = DecodeGraph(self.stock, cache, self.stream)
            graph = slots.graph
            assert isinstance(graph, DecodeGraph)
            logits = graph.replay(kwargs["input_ids"], kwargs.get("position_ids"), cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def takes(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether a call is one token per sequence behind a filled cache, and no more."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if not (self.enabled and self.capturable and isinstance(ids, torch.Tensor)):
            return False
        if not isinstance(cache, IntegerCache) or cache.pool is not self.pool or not cache.filled:
            return False
        if cache.must_read(kwargs.get("attention_mask")) or not self._is_usual(kwargs):
            return False
        room = cache.filled < cache.slots.capacity  # an eager pass takes more memory
        return room and tuple(ids.shape) == (cache.slots.batch, 1)

    def _is_usual(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether all that is asked of a pass leaves a decode step as it is captured."""
        asked = {name: getattr(self.model.config, name, None) for name in _LOOKED_UP}
        asked |= {n: v for n, v in kwargs.items() if n not in _INPUTS and v is not None}
        return all(v is None or _changes_nothing(n, v) for n, v in asked.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None}  # a copy captures on a stream of its own


def _changes_nothing(name: str, value: object) -> bool:
    """Tell whether an argument of a pass leaves a decode step as it is captured."""
    return not isinstance(value, torch.Tensor) and value in _USUAL.get(name, (False,))


def run_on_graphs(model: PreTrainedModel, pool: SlotPool, capturable: bool) -> GraphRunner:
    """Let decode steps of a model on the slots of its pool run on CUDA graphs, in place."""
    runner = GraphRunner(model, pool, capturable)
    model.forward = runner  # type: ignore[method-assign]
    return runner
