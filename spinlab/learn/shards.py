"""Networks spread over all processes (FSDP2): a layer is gathered while it computes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.kv.cache import join_kv, kv_path_of
from spinlab.model.load import cast_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import decoder_of, layers_of, map_of, set_map
from spinlab.model.network import Network, drop


def shard_layers(model: PreTrainedModel) -> None:
    """Spread the frozen weights of a whole network over all processes, in place.

    The head stays whole: the loss multiplies with it chunk by chunk.
    """
    if parallel.world() == 1:
        return
    shard = _sharding(model)
    for layer in layers_of(model):
        shard(layer)
    shard(decoder_of(model))


def sharded(network: Network, described: ModelMap, dtype: str | None) -> PreTrainedModel:
    """Return a network spread over all processes as `shard_layers` does it.

    described: the map of the whole; dtype: of the network while it learns, its own if absent. Where
    the network comes in parts a process holds its shards, the ends and one layer at most; where it
    is there as a whole, as that of random weights, which are in no file, every process holds it
    once.
    """
    model = network.base()
    wanted = getattr(torch, dtype) if dtype else model.dtype
    cast_model(model, wanted)
    if network.part is not None:
        shard, paths = _sharding(model), []
        for index in range(len(described.layers)):
            part = cast_model(network.part(index), wanted)
            paths.append(kv_path_of(part))
            _take_layer(model, part, shard)
        set_map(model, described)
        join_kv(model, paths)
        shard(decoder_of(model))
    else:
        shard_layers(model)
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Tell whether a network's weights are spread over processes."""
    return isinstance(decoder_of(model), FSDPModule)


def _sharding(model: PreTrainedModel) -> Callable[[nn.Module], object]:
    """Return what spreads a module of a model over all processes, in place."""
    mesh = init_device_mesh(model.device.type, (parallel.world(),))
    return partial(fully_shard, mesh=mesh)


def _take_layer(
    model: PreTrainedModel, part: PreTrainedModel, shard: Callable[[nn.Module], object]
) -> None:
    """Move the layer of a part to its place in a model, which had none there, and spread it."""
    ((_, described),) = map_of(part).there.items()
    layer = part.get_submodule(described.path)
    drop(part)
    shard(layer)
    model.set_submodule(described.path, layer)
