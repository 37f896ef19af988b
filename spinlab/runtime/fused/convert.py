"""The hand-off to the runtime: a stock model's layers become modules that run on its operations.

integer_runtime(model, parts, operations) swaps a rotated model's layers in place.
runtime_from_packed(config, make_weight, parts, operations, device, dtype) builds a model around
packed weights, without float ones. new_cache(model, capacity) makes a cache.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from spinlab.errors import InputError
from spinlab.fakequant.activations import InputPath
from spinlab.kv.bias import RopeWatch
from spinlab.kv.path import KVPath, taken_apart
from spinlab.model.modules import decoder_of, linears_of, make_rope, map_of, prepare
from spinlab.runtime.fused.build import LayerBuilder, Maker, QuantizedMaker
from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.graphs import GraphRunner, run_on_graphs
from spinlab.runtime.fused.operations import REFERENCE, Operations
from spinlab.runtime.fused.slots import Layout, SlotPool
from spinlab.runtime.kernels.formats import PackedWeight
from spinlab.runtime.quantized import Quantized
from spinlab.weights.ends import write_ends

log = logging.getLogger(__name__)

ATTENTION = "spinlab_integer"  # known to no mask function of transformers: masks are not made
_POOL, _RUNNER = "slot_pool", "graph_runner"  # attributes of a model
_RUNS = (
    "a codec of the KV cache codes runs of tokens (kivi, or qjl with outlier channels), and the "
    "integer runtime codes every token as it comes"
)
_APART = "keys whose bias is apart: new tokens attend in torch, outside the 4-bit kernels"
_NAMES = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
MakeWeight = Callable[[str, int, int, int], PackedWeight]


def integer_runtime(model: PreTrainedModel, parts: Quantized, operations: Operations) -> None:
    """Make a rotated stock model run on these operations, in place.

    forward() and generate() stay as they are and keep their cache packed where `parts.kv` asks for
    it. float64 models take the reference operations. Linears that no operation multiplies run in
    torch, with a warning that names them. Raises InputError for models that are not gated by SiLU.
    """
    operations = REFERENCE if model.dtype == torch.float64 else operations
    _swap(model, QuantizedMaker(parts.weights, operations), parts)
    write_ends(model, parts.weights, parts.quant)


def runtime_from_packed(
    config: PreTrainedConfig,
    make_weight: MakeWeight,
    parts: Quantized,
    operations: Operations,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a model around packed weights; embedding and head are drawn at random.

    The gains of norms are 1, as where all are folded, and must stay so.
    make_weight: (full name of a linear, out, in, groups of its input) to its packed weight, which
    stands for the weights of the parts
    """
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    prepare(model)

    class Given(Maker):
        def packed(
            self, name: str, linear: nn.Linear, path: InputPath
        ) -> tuple[PackedWeight | None, str]:
            out, width = linear.weight.shape
            return make_weight(name, out, width, self.input_groups(linear, path)), ""

    model.eval().requires_grad_(False)
    _materialize(model, device)
    _swap(model, Given(operations), parts)
    return model


def why_not_runtime(model: PreTrainedModel, kv: KVPath) -> str | None:
    """Say why a stock model cannot run on the integer runtime as long as it is; None if it can."""
    if (reason := _unlike(model, kv)) is not None:
        return reason
    window = _window(model)
    if window is not None and window < model.config.max_position_embeddings:
        return f"the model has a sliding window of {window}, which the integer runtime lacks"
    return None


def check_runtime(model: PreTrainedModel, kv: KVPath) -> None:
    """Raise InputError for a model or a cache that the integer runtime cannot compute."""
    if (reason := _unlike(model, kv)) is not None:
        raise InputError(f"{reason}: use runtime.backend=torch")


def _unlike(model: PreTrainedModel, kv: KVPath) -> str | None:
    """Say which module or cache of a model the integer runtime has no twin for; None if none."""
    if any(history.run > 1 for history in kv.histories):
        return _RUNS
    for layer in map_of(model).layers:
        norms = (layer.attention.query_norm, layer.attention.key_norm)
        if any(path is not None and path not in map_of(model).norm_at for path in norms):
            return (
                f"queries and keys of {layer.path} go through norms that are no RMSNorms, and the "
                "integer runtime knows no other"
            )
        if layer.attention.latent is not None:
            return (
                f"keys and values of {layer.path} are made of a latent, which is what the cache "
                "holds, and the integer runtime keeps keys and values of heads"
            )
        if layer.attention.neighbours:
            return (
                f"RoPE of {layer.path} turns neighbours, and the integer runtime halves of a head"
            )
        if (cap := layer.attention.softcap) is not None:
            return (
                f"attention of {layer.path} caps its scores at {cap:g}, and the integer runtime "
                "has no soft caps"
            )
        if layer.attention.sinks:
            return f"attention of {layer.path} has sinks, and the integer runtime has none"
        if layer.mlp is None:
            return f"{layer.path} has no gated MLP alone, and the integer runtime knows no other"
        if not layer.mlp.by_silu:
            return (
                f"the model's activation is {layer.mlp.activation}, and the integer runtime gates "
                "by SiLU only"
            )
    return None


def new_cache(model: PreTrainedModel, capacity: int) -> IntegerCache:
    """Return an empty cache of a runtime's model with room for so many tokens per sequence."""
    return IntegerCache(getattr(model, _POOL), capacity)


def slot_layout(model: PreTrainedModel) -> Layout | None:
    """Say how a runtime's model keeps keys and values; None for a model without a runtime."""
    pool: SlotPool | None = getattr(model, _POOL, None)
    return None if pool is None else pool.layout


def graph_runner(model: PreTrainedModel) -> GraphRunner:
    """Return what runs a model's decode steps: its `enabled` turns CUDA graphs off and on."""
    return getattr(model, _RUNNER)


def _swap(model: PreTrainedModel, maker: Maker, parts: Quantized) -> None:
    check_runtime(model, parts.kv)
    parts = replace(parts, kv=taken_apart(model, parts.kv))
    layout = _layout(model, parts.kv)
    LayerBuilder(model, maker, parts).build()
    if map_of(model).only in (None, (0,)):  # of a network in parts the first layer tells
        maker.report()
        _report(layout, maker.operations)
    pool = SlotPool(layout)
    # everything that hangs on the model is a method or a partial: a deep copy of it has its own
    setattr(model, _POOL, pool)
    model.config._attn_implementation = ATTENTION
    _insert_cache(model, pool)
    prepare = partial(_prepare_cache, model)
    setattr(model, "_prepare_cache_for_generation", prepare)  # noqa: B010 - a method of the class
    on_cuda = maker.operations.on_device and model.device.type == "cuda"
    runner = run_on_graphs(model, pool, on_cuda and not map_of(model).moving_rope)
    setattr(model, _RUNNER, runner)


def _report(layout: Layout, operations: Operations) -> None:
    """Warn of what the cache's layout leaves to torch."""
    if layout.in_torch:
        log.warning("outside the attention kernels, in torch: %s", "; ".join(layout.in_torch))
    packed = any(layout.packed(layer) for layer in range(layout.layers))
    if layout.positions and packed and not operations.biased:
        log.warning(_APART)


def _layout(model: PreTrainedModel, path: KVPath) -> Layout:
    """Say what a model keeps of keys and values, which are rows of tokens."""
    dimensions = map_of(model).dimensions
    return Layout(
        kv_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        sides=tuple(path.sides(layer) for layer in range(dimensions.layers)),
        histories=tuple(path.history(layer) for layer in range(dimensions.layers)),
        window=_window(model),
        dtype=model.dtype,
        device=model.device,
        there=tuple(map_of(model).there),
        positions=bool(path.biases),
    )


def _window(model: PreTrainedModel) -> int | None:
    """Return the narrowest sliding window of a stock model's layers."""
    found = (layer.attention.window for layer in map_of(model).layers)
    return min((window for window in found if window is not None), default=None)


def _insert_cache(model: PreTrainedModel, pool: SlotPool) -> None:
    """Open the runtime's cache before the decoder's passes and close it behind them."""
    decoder = decoder_of(model)
    watch = RopeWatch(model) if pool.layout.positions else None
    decoder.register_forward_pre_hook(partial(_begin, pool, watch), with_kwargs=True)
    decoder.register_forward_hook(_end, with_kwargs=True)


def _begin(
    pool: SlotPool, watch: RopeWatch | None, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    kwargs = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, IntegerCache):
        if cache is not None and cache.get_seq_length():
            raise InputError(
                f"a filled {type(cache).__name__} cannot be coded: begin with new_cache(model)"
            )
        cache = IntegerCache(pool)
    if cache.pool is not pool:
        raise InputError("the cache belongs to another model: begin with new_cache(model)")
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    batch, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    if mask is not None and mask.dim() != 2:
        raise InputError("the integer runtime takes attention masks (batch, tokens) only")
    cache.begin(batch, tokens, mask)
    if watch is not None:
        watch.begin(cache)
    return (), {**kwargs, "past_key_values": cache, "attention_mask": None}


def _end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    kwargs["past_key_values"].end()
    if kwargs.get("use_cache") is False:
        output.past_key_values = None
    return output


def _prepare_cache(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Let `generate` begin with a cache of the capacity it will need."""
    stock = cast(Any, type(model))._prepare_cache_for_generation
    given = inspect.signature(stock).bind(model, *args, **kwargs).arguments
    of_model, config = given["model_kwargs"], given["generation_config"]
    if of_model.get("past_key_values") is None and config.use_cache is not False:
        of_model["past_key_values"] = new_cache(model, given["max_cache_length"])
        return None
    return stock(model, *args, **kwargs)


def _materialize(model: PreTrainedModel, device: torch.device) -> None:
    """Draw what a skeleton on no device keeps of its own: embedding, norms, head, frequencies."""
    linears = {id(linear.weight) for _, linear in linears_of(model)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in linears or not parameter.is_meta:
                continue
            drawn = torch.empty_like(parameter, device=device)
            drawn = drawn.normal_(std=0.02) if parameter.dim() > 1 else drawn.fill_(name != "bias")
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    make_rope(model, device)
