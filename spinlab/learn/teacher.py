"""The original model as a teacher: what it says of a batch, without gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.formats.integer import at_least_float32
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.learn.shards import is_sharded
from spinlab.learn.spaces import LearningSpace
from spinlab.model.hooks import hidden_states, temporary_hooks
from spinlab.model.modules import decoder_of, layers_of, linears_of


@contextmanager
def unquantized(model: PreTrainedModel) -> Iterator[None]:
    """Switch off every quantizer of a fake-quantized network for a while."""
    kv = kv_path_of(model)
    modules = [linear for _, linear in linears_of(model)]
    paths = {m.path: m.path.quantizer for m in modules if isinstance(m, FakeQuantLinear)}
    set_kv_path(model, kv.uncoded())
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
    """Return what every decoder layer reads, then what the last writes: (batch, length, hidden).

    ids: (batch, length) token ids. Of a part of a network it is about the layers that are there.
    """
    states: list[torch.Tensor] = []
    layers = layers_of(model)

    def keep(module: nn.Module, args: tuple) -> None:
        states.append(args[0])

    def keep_last(module: nn.Module, args: tuple, out: Any) -> None:
        states.append(hidden_states(out))

    with temporary_hooks() as hooks:
        hooks += [layer.register_forward_pre_hook(keep) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(keep_last))
        decoder_of(model)(input_ids=ids, use_cache=False)
    return states


def relative_error(output: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Return |output - original|² / |original|² over all entries, of any one shape."""
    wide = at_least_float32(original)
    return (output.to(wide.dtype) - wide).square().sum() / wide.square().sum()


def layer_errors(
    model: PreTrainedModel, space: LearningSpace, ids: torch.Tensor, states: list[torch.Tensor]
) -> torch.Tensor:
    """Return the mean over layers of each one's relative error on the original's input.

    Layers are cut from each other: every one starts from `states`, as `layer_states` gives them for
    the same ids (batch, length), so that a gradient stays in its layer.
    """
    errors: list[torch.Tensor] = []
    in_shards = is_sharded(model)

    def replace_input(module: nn.Module, args: tuple) -> tuple:
        x = space.enter(states[len(errors)])
        if in_shards and not x.requires_grad:
            x = x.detach().requires_grad_()  # a layer goes when a gradient comes to its input
        return (x, *args[1:])

    def compare(module: nn.Module, args: tuple, out: Any) -> None:
        errors.append(relative_error(space.leave(hidden_states(out)), states[len(errors) + 1]))

    with temporary_hooks() as hooks:
        for layer in layers_of(model):
            # first of all, so that what gathers a layer sees the input that it has
            hooks.append(layer.register_forward_pre_hook(replace_input, prepend=True))
            hooks.append(layer.register_forward_hook(compare))
        decoder_of(model)(input_ids=ids, use_cache=False)
    return torch.stack(errors).mean()
