"""A pass as a CUDA graph: replayed, it costs the host one launch."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Form:
    """Say what is captured: tokens of a pass, and how many logits it keeps (0: all)."""

    tokens: int
    kept: int = 0

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "Form":
        tokens = kwargs["input_ids"].shape[1]
        return cls(tokens, 0 if tokens == 1 else kwargs.get("logits_to_keep") or 0)


class PassGraph:
    """Hold a captured pass for the slots of one cache, with the tensors it reads and writes.

    A pass of one token comes behind others; one of several is the first.

    ids, positions  (batch, tokens) int64
    logits          (batch, tokens or what is kept of them, vocabulary)
    """

    def __init__(
        self, forward: Callable[..., Any], form: Form, cache: IntegerCache, place: "Place | None"
    ) -> None:
        slots, before = cache.slots, cache.filled
        like = {"dtype": torch.int64, "device": slots.start.device}
        self.ids, self.positions = torch.zeros(2, slots.batch, form.tokens, **like)
        self.first = torch.arange(form.tokens, **like)

        def step(cache: IntegerCache) -> torch.Tensor:
            filled = cache.filled
            inputs = {"input_ids": self.ids, "position_ids": self.positions}
            asked = {"use_cache": True, "logits_to_keep": form.kept}
            logits = forward(**inputs, past_key_values=cache, **asked).logits
            cache.filled = filled  # replays count for themselves
            return logits

        try:
            # neither step nor cache is kept: a graph outlives the cache it was captured with
            self.run, self.logits = capture(step, cache, place)
        except BaseException:
            cache.rewind(before)
            raise

    def replay(
        self, ids: torch.Tensor, positions: torch.Tensor | None, cache: IntegerCache
    ) -> torch.Tensor:
        """Run a pass on new ids (batch, tokens); return a copy of its logits."""
        self.ids.copy_(ids)
        if positions is None:  # tokens count from the first slot, as in the stock model
            positions = cache.slots.length if cache.filled else self.first
        self.positions.copy_(positions)
        self.run()
        cache.filled += self.ids.shape[1]
        return self.logits.clone()


@dataclass(frozen=True)
class Place:
    """Say where graphs are captured: kernels keep workspaces per stream, so that one serves all.

    pool: their memory, which they share, as no two run at once and what they leave is copied
    """

    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)


def capture(
    step: Step, cache: IntegerCache, place: Place | None
) -> tuple[Callable[[], None], torch.Tensor]:
    """Return what replays a step on a cache's slots, and the tensor it leaves its result in."""
    assert place is not None, "graphs are captured on a stream of their own"
    main = torch.cuda.current_stream()
    place.stream.wait_stream(main)
    try:
        with torch.cuda.stream(place.stream):
            for _ in range(_WARM_UPS):
                step(cache)
                cache.rewind(cache.filled)
    finally:  # what a step that broke off has begun still writes into the cache
        main.wait_stream(place.stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=place.stream, pool=place.pool):
        result = step(cache)  # nothing runs yet
    return graph.replay, result


class GraphRunner:
    """Take a model's forward passes: a decode step goes to its graph, all else to the stock pass.

    enabled: a switch; `capturable` says whether the model's operations allow graphs at all.
    prompts: a switch, off by itself, for first passes without padding too. Every size of a prompt
    is captured once for a cache, which takes some passes and keeps memory: for sizes that come
    back, where the host is slower than the device.
    A deep copy of a model has a runner of its own: `stock`, being bound, is bound to the copy.
    """

    def __init__(self, model: PreTrainedModel, pool: SlotPool, capturable: bool) -> None:
        functools.update_wrapper(self, model.forward)  # generate() reads its signature
        self.model, self.pool, self.stock = model, pool, model.forward
        self.capturable, self.enabled, self.prompts = capturable, True, False
        self.place: Place | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not self.takes(kwargs):
            return self.stock(*args, **kwargs)
        cache: IntegerCache = kwargs["past_key_values"]
        form = Form.of(kwargs)
        # outside of inference mode, so that its tensors can be written in any mode
        with torch.inference_mode(False), torch.no_grad():
            cache.before_replay(len(kwargs["input_ids"]), form.tokens)
            graphs = cache.slots.graphs
            if form not in graphs:
                if self.place is None and cache.slots.start.is_cuda:
                    self.place = Place()
                graphs[form] = PassGraph(self.stock, form, cache, self.place)
            graph = graphs[form]
            assert isinstance(graph, PassGraph)
            logits = graph.replay(kwargs["input_ids"], kwargs.get("position_ids"), cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def takes(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether a call is one token per sequence behind a filled cache, and no more.

        With `prompts` also whether it is several tokens without padding before an empty one.
        """
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if not (self.enabled and self.capturable and isinstance(ids, torch.Tensor)):
            return False
        if not isinstance(cache, IntegerCache) or cache.pool is not self.pool:
            return False
        mask, first = kwargs.get("attention_mask"), not cache.filled
        if ids.dim() != 2 or not self._is_usual(kwargs, first):
            return False
        if first:
            return self.prompts and ids.shape[1] > 1 and _hides_nothing(mask, ids)
        if cache.must_read(mask):
            return False
        room = cache.filled < cache.slots.capacity  # an eager pass takes more memory
        return room and tuple(ids.shape) == (cache.slots.batch, 1)

    def _is_usual(self, kwargs: Mapping[str, Any], first: bool) -> bool:
        """Tell whether all that is asked of a pass leaves it as it is captured.

        A prompt is captured with what its caller keeps of the logits.
        """
        asked = {name: getattr(self.model.config, name, None) for name in _LOOKED_UP}
        asked |= {n: v for n, v in kwargs.items() if n not in _INPUTS and v is not None}
        if first and isinstance(asked.get("logits_to_keep"), int):
            del asked["logits_to_keep"]
        return all(v is None or _changes_nothing(n, v) for n, v in asked.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "place": None}  # a copy captures on a stream of its own


def _changes_nothing(name: str, value: object) -> bool:
    """Tell whether an argument of a pass leaves it as it is captured."""
    return not isinstance(value, torch.Tensor) and value in _USUAL.get(name, (False,))


def _hides_nothing(mask: torch.Tensor | None, ids: torch.Tensor) -> bool:
    return mask is None or (mask.shape == ids.shape and bool(mask.all()))


def run_on_graphs(model: PreTrainedModel, pool: SlotPool, capturable: bool) -> GraphRunner:
    """Let passes of a model on the slots of its pool run on CUDA graphs, in place."""
    runner = GraphRunner(model, pool, capturable)
    model.forward = runner  # type: ignore[method-assign]
    return runner
