"""Time integer linears and a quantized model's decoding on a CPU, side by side with float32."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.bench.methods import random_rotations
from spinlab.bench.models import random_llama
from spinlab.config import (
    ClipSearch,
    CodecConfig,
    Config,
    KVConfig,
    TensorQuant,
    plain,
)
from spinlab.fakequant.activations import InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.report.online import online_settings
from spinlab.runtime.kernels.matmul import kernel_for
from spinlab.runtime.stock.linear import IntegerLinear
from spinlab.track.environment import environment
from spinlab.weights.layerwise import quantize_rtn
from spinlab.weights.rtn import rtn

SCHEMA = 1
K = TypeVar("K")
# (tokens, out, in): a square one, and what SmolLM2-135M multiplies, q k v as one
LINEARS = (
    (1, 2048, 2048),
    (8, 2048, 2048),
    (128, 2048, 2048),
    (1, 4096, 4096),
    (1, 960, 576),
    (1, 576, 576),
    (1, 3072, 576),
    (1, 576, 1536),
)
_OFF = CodecConfig(bits=16)
_CACHES = {"kv16": KVConfig(_OFF, _OFF), "kv4": KVConfig()}
_ROUNDING = ClipSearch(search=False)  # levels take the same time, whichever they are
_WARM_UP = 3


def bench_cpu(
    name: str,
    layers: int | None,
    context: int = 128,
    repeats: int = 100,
    threads: Sequence[int] = (1,),
    linears: Sequence[tuple[int, int, int]] = LINEARS,
    methods: Mapping[str, Config] | None = None,
) -> dict[str, Any]:
    """Return the record of one run, all on random weights and tokens; seconds are medians.

    Linears run on one thread, and decoding on each number of `threads`; that on more than one has
    it in its metrics' names. What is compared takes turns, so that other work on the machine falls
    on all alike. context: tokens in the cache before the first one is timed; one is added each
    time. repeats: timed calls. methods: by name, those whose rotations run online; without any R3
    and R4 do, and metrics have no method's name.
    """
    methods = methods or {"": Config()}
    metrics: dict[str, float] = {}
    with torch.inference_mode():
        with _threads(1):
            for shape in linears:
                metrics |= _linear(*shape, repeats)
        models = _models(name, layers, methods)
        for count in threads:
            with _threads(count):
                metrics |= _decode(models, context, repeats, count)
    layers = models["", "fp32"].config.num_hidden_layers
    settings = {"model": name, "layers": layers, "context": context, "repeats": repeats}
    online = {
        method: {"quant": plain(config.quant), "settings": online_settings(config)}
        for method, config in methods.items()
    }
    return {
        "schema": SCHEMA,
        "experiment": f"bench/cpu/{name}",
        "environment": environment(),
        "config": {**settings, "threads": list(threads), "methods": online},
        "metrics": metrics,
    }


def _linear(tokens: int, rows: int, columns: int, repeats: int) -> dict[str, float]:
    """Time one linear of the two kinds, quantization of its input included."""
    weight, x = torch.randn(rows, columns), torch.randn(1, tokens, columns)
    levels = rtn(weight, TensorQuant(symmetric=True), _ROUNDING)
    path = InputPath(None, TokenQuantizer(IntegerFormat(4, symmetric=False)))
    matmul = kernel_for("cpu", levels.format, torch.device("cpu"))
    integer = IntegerLinear(levels, None, path, matmul, torch.float32)
    wide = nn.Linear(columns, rows, bias=False)
    wide.weight.copy_(weight)
    seconds = _taking_turns({"fp32": lambda: wide(x), "w4a4": lambda: integer(x)}, repeats, 2)
    name = f"cpu/linear/{tokens}x{rows}x{columns}"
    metrics = {f"speed/{name}/{kind}/seconds": value for kind, value in seconds.items()}
    return metrics | {f"speedup/{name}": seconds["fp32"] / seconds["w4a4"]}


def _models(
    name: str, layers: int | None, methods: Mapping[str, Config]
) -> dict[tuple[str, str], PreTrainedModel]:
    """Return a random model as it is ("", "fp32") and each method's, by kind of cache."""

    def original() -> PreTrainedModel:
        torch.manual_seed(0)
        return random_llama(name, layers, torch.device("cpu"))

    models = {("", "fp32"): original()}
    for method, config in methods.items():
        rotations = random_rotations(config, map_of(models["", "fp32"]))
        networks = {k: QuantizedNetworks(original, config.quant, kv) for k, kv in _CACHES.items()}
        weights = quantize_rtn(networks["kv16"].fused(rotations), config.quant, _ROUNDING, {})
        for kind, network in networks.items():
            models[method, kind] = network.integer(rotations, weights, "cpu")
    return models


def _decode(
    models: Mapping[tuple[str, str], PreTrainedModel], context: int, repeats: int, threads: int
) -> dict[str, float]:
    """Time a step of decoding behind `context` tokens."""
    wide = models["", "fp32"]
    tokens = torch.randint(wide.config.vocab_size, (1, context + 1))
    steps = {key: _step(model, tokens) for key, model in models.items()}
    seconds = _taking_turns(steps, repeats)
    metrics: dict[str, float] = {}
    for (method, kind), value in seconds.items():
        parts = ("cpu/decode", method, "" if threads == 1 else f"threads{threads}")
        name = "/".join(part for part in parts if part)
        network = kind if kind == "fp32" else f"int4_{kind}"
        metrics[f"speed/{name}/{network}/seconds_per_token"] = value
        if kind != "fp32":
            metrics[f"speedup/{name}/{kind}"] = seconds["", "fp32"] / value
    return metrics


def _step(model: PreTrainedModel, tokens: torch.Tensor) -> Callable[[], object]:
    """Fill a cache with all tokens but the last, and return what decodes that, once a call."""
    cache = model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    last = tokens[:, -1:]
    return lambda: model(last, past_key_values=cache, use_cache=True)


def _taking_turns(
    work: Mapping[K, Callable[[], object]], repeats: int, unheard: int = 0
) -> dict[K, float]:
    """Return the median seconds of each call; they alternate.

    unheard: calls before each timed one, which then finds the caches as it leaves them.
    """
    seconds: dict[K, list[float]] = {name: [] for name in work}
    for index in range(_WARM_UP + repeats):
        for name, call in work.items():
            for _ in range(unheard):
                call()
            start = perf_counter()
            call()
            if index >= _WARM_UP:
                seconds[name].append(perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on so many threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
