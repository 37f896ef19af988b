"""The original model as a teacher: what it says of a batch, without gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.learn.objectives import relative_error
from spinlab.learn.spaces.base import NetworkForm
from spinlab.model.modules import decoder_of, layers_of, linears_of


@contextmanager
def unquantized(model: PreTrainedModel) -> Iterator[None]:
    """Switch off every quantizer of a fake-quantized network for a while."""
    kv = kv_path_of(model)
    modules = [linear for _, linear in linears_of(model)]
    paths = {m.path: m.path.quantizer for m in modules if isinstance(m, FakeQuantLinear)}
    set_kv_path(model, replace(kv, keys=None, values=None, queries=None))
    _set_quantizers(dict.fromkeys(paths))
    try:
        yield
    finally:
        _set_quantizers(paths)
        set_kv_path(model, kv)


def _set_quantizers(paths: Mapping[InputPath, TokenQuantizer | None]) -> None:
    for path, quantizer in paths.items():
        path.quantizer = quantizer


@torch.no_grad()
def layer_states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return what every decoder layer reads, then what the last one writes."""
    states: list[torch.Tensor] = []
    layers = layers_of(model)
    hooks = [x.register_forward_pre_hook(lambda m, args: states.append(args[0])) for x in layers]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, out: states.append(_first(out))))
    decoder_of(model)(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def layer_errors(
    model: PreTrainedModel, form: NetworkForm, ids: torch.Tensor, states: list[torch.Tensor]
) -> torch.Tensor:
    """Return the mean over layers of each one's relative error on the original's input.

    Layers are cut from each other: every one starts from `states`, so that a gradient stays in its
    layer.
    """
    errors: list[torch.Tensor] = []
    hooks = []

    def replace_input(module: nn.Module, args: tuple) -> tuple:
        return (form.enter(states[len(errors)]), *args[1:])

    def compare(module: nn.Module, args: tuple, out) -> None:
        errors.append(relative_error(form.leave(_first(out)), states[len(errors) + 1]))

    for layer in layers_of(model):
        hooks.append(layer.register_forward_pre_hook(replace_input))
        hooks.append(layer.register_forward_hook(compare))
    decoder_of(model)(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(errors).mean()


def _first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
