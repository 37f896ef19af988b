"""Networks spread over all processes (FSDP2): a layer is gathered while it computes."""

import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import LearnConfig, QuantConfig
from spinlab.errors import InputError
from spinlab.kv.bias import KeyBias, KeyBiases
from spinlab.kv.cache import is_coded, kv_path_of, set_kv_path
from spinlab.learn.spaces.linear import LearnedLinear
from spinlab.learn.spaces.owners import LearnedLinears
from spinlab.model.load import cast_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import decoder_of, layers_of, map_of, set_map
from spinlab.model.network import Network, drop


class Learnable(NamedTuple):
    """Hold the network that is learned on, and what a learner takes beside it.

    teacher: the original, where that is another network; linears: of a network in shards those
    whose weights are written anew each step.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None = None
    linears: LearnedLinears | None = None


def in_shards(
    network: Network,
    original: Network,
    described: ModelMap,
    learn: LearnConfig,
    quant: QuantConfig,
) -> Learnable:
    """Spread what is learned on over all processes; described: the map of the whole.

    Where networks come in parts a process holds its shards, the ends and one layer at most; where
    they are there as a whole, as those of random weights, which are in no file, every process holds
    each of them once. Raises InputError for rounded experts that this torch cannot spread.
    """
    if not learn.rounds(quant):
        return Learnable(sharded(network, described, learn.dtype))
    _check_experts(described)
    model = network.base()
    dtype = _dtype(model, learn.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    linears = LearnedLinears(described, learn, quant, model.device, wide)
    _spread(model, network, described, _Sharding(model, dtype, linears))
    needs_teacher = learn.objective.needs_teacher
    teacher = sharded(original, described, learn.dtype) if needs_teacher else None
    return Learnable(model, teacher, linears)


def _check_experts(described: ModelMap) -> None:
    """Raise InputError where gradients of experts could not be gathered from all processes."""
    experts = any(site.expert is not None for site in described.sites)
    if experts and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise InputError(
            "learn.shard: rounded weights of experts, of which some meet no token of a process, go "
            f"into shards by torch 2.13, and this is {torch.__version__}: use learn.shard=off, "
            "learn.quantize_weights=false or a later torch"
        )


def sharded(network: Network, described: ModelMap, dtype: str | None) -> PreTrainedModel:
    """Return a network with frozen weights, spread over all processes; the head stays whole.

    dtype: of the network while it learns, its own if absent. The rest is as in `in_shards`.
    """
    model = network.base()
    _spread(model, network, described, _Sharding(model, _dtype(model, dtype), None))
    return model


def is_sharded(model: PreTrainedModel) -> bool:
    """Tell whether a network's weights are spread over processes."""
    return isinstance(decoder_of(model), FSDPModule)


class _Sharding:
    """Spread layers of a model, whole or in parts, with rooms for weights that are written."""

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, linears: LearnedLinears | None
    ) -> None:
        # nothing changes in place what a decoder gives
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self.mesh = init_device_mesh(model.device.type, (parallel.world(),))
        self.dtype, self.linears = dtype, linears

    def prepare(self, model: PreTrainedModel) -> None:
        """Take the linears of a model, or of a part, and cast what it has beside them."""
        if self.linears is not None:
            self.linears.take(model)
        cast_model(model, self.dtype)

    def moved(self, part: PreTrainedModel, model: PreTrainedModel) -> KeyBiases:
        """Move the layer of a part to its place in a model, and spread it.

        Return what its keys have for a bias that is kept apart, if the model keeps any so.
        """
        self.prepare(part)
        ((index, described),) = map_of(part).there.items()
        layer = part.get_submodule(described.path)
        biases = kv_path_of(part).biases if is_coded(part) else ()
        drop(part)
        self.spread(layer)
        model.set_submodule(described.path, layer)
        return biases[index : index + 1]

    def spread(self, module: nn.Module) -> None:
        """Spread what a module has, over all processes."""
        linears = [] if self.linears is None else self.linears.within(module)
        if not linears:
            fully_shard(module, mesh=self.mesh)
            return
        self._spread_written(module, linears)

    def _spread_written(self, layer: nn.Module, linears: list[LearnedLinear]) -> None:
        """Spread weights that get gradients, which add up over processes, and nothing else.

        What is small stays whole: biases, whose gradients are handed on by themselves, and norms.
        """
        wide = linears[0].wide
        for linear in linears:
            linear.make_room(wide)
        policy = MixedPrecisionPolicy(self.dtype, wide, cast_forward_inputs=False)
        own = {id(linear.module.weight) for linear in linears}
        rest = {parameter for parameter in layer.parameters() if id(parameter) not in own}
        fully_shard(layer, mesh=self.mesh, mp_policy=policy, ignored_params=rest)
        assert isinstance(layer, FSDPModule)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
        if any(linear.site.expert is not None for linear in linears):
            layer.set_reduce_scatter_unused_params(True)  # of experts that no token came to here


def _dtype(model: PreTrainedModel, name: str | None) -> torch.dtype:
    return getattr(torch, name) if name else model.dtype


def _spread(
    model: PreTrainedModel, network: Network, described: ModelMap, sharding: _Sharding
) -> None:
    """Spread a network, in place, of which the ends are there, or all."""
    sharding.prepare(model)
    if network.part is None:
        for layer in layers_of(model):
            sharding.spread(layer)
    else:
        biases: list[KeyBias | None] = []
        for index in range(len(described.layers)):
            biases += sharding.moved(network.part(index), model)
        set_map(model, described)
        if is_coded(model):
            set_kv_path(model, replace(kv_path_of(model), biases=tuple(biases)))
    sharding.spread(decoder_of(model))
