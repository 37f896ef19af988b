"""The networks an experiment compares, assembled from a stock model, rotations and weights.

fp      the original
rtn     no rotation, weights rounded to nearest, on integer kernels
init    the initial rotation, weights by the experiment's method, on integer kernels
fake    the learned rotation, quantization emulated in floating point
int4    the same weights as `fake`, on integer kernels
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.config import KVConfig, QuantConfig
from spinlab.fakequant.insert import FakeQuantLinear, insert_fake_quant
from spinlab.kv.cache import attach_kv, kv_path
from spinlab.model.load import cast_model, exact_norms
from spinlab.model.seams import family_of, linear_at, linears_of
from spinlab.rotation.fuse import fold_norms, fuse, fuse_inputs, fuse_stream
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import integer_runtime, why_not_runtime
from spinlab.runtime.fused.operations import triton_operations
from spinlab.runtime.stock.insert import insert_integer_linears, write_ends
from spinlab.weights.quantized import QuantizedWeight, dequantize_in_calls, empty_weight

log = logging.getLogger(__name__)

_STORED_BYTES = 2  # of a number that is not quantized: embedding, head and norms rest in 16 bits


@dataclass(frozen=True)
class Networks:
    """Assemble networks from fresh copies of one original, with one set of formats."""

    original: Callable[[], PreTrainedModel]
    quant: QuantConfig
    kv: KVConfig

    def fused(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model with nothing online: weights as quantizers want them."""
        model = self.original()
        fold_norms(model)
        fuse(model, rotations)
        return model

    def stream_rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model without what runs online: the original's function as it is."""
        model = self.original()
        fold_norms(model)
        fuse_stream(model, rotations)
        return model

    def rotated(self, rotations: RotationSet) -> PreTrainedModel:
        """Return the rotated model with R3 and R4 online and nothing quantized."""
        model = self.fused(rotations)
        insert_fake_quant(model, rotations, None)
        attach_kv(model, kv_path(model, rotations.r3, None), store=False)
        return model

    def learnable(self, rotations: RotationSet, inputs: bool = False) -> PreTrainedModel:
        """Return the network that rotations are learned on.

        R1 and R2 are not fused, the rest is; with `inputs` those of single inputs are left out too.
        """
        if inputs:
            rotations = replace(rotations, inputs={})
        model = self.original()
        fold_norms(model)
        fuse_inputs(model, rotations)
        self._fake_quant(model, rotations)
        return model

    def emulated(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the quantized network in floating point, with the integer kernels' rounding.

        Products of levels are exact in floats too, so this is bit for bit what integers give. A
        product of dequantized floats is the same function only up to float noise, which flips
        levels here and there; every flip makes more of them, and after thirty layers two such
        networks are independent samples of the rounding noise.
        """
        model = self._bare(rotations, weights)
        insert_integer_linears(model, weights, rotations, self.quant, "reference")
        attach_kv(model, kv_path(model, rotations.r3, self.kv), store=False)
        return model

    def integer(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight], backend: str
    ) -> PreTrainedModel:
        """Return the quantized network on integer kernels, with a packed KV cache.

        The `triton` back end is a runtime of its own, made of fused GPU kernels; `auto` takes it
        for the models that it runs, and the exact product for others, with a warning.
        """
        model = self._bare(rotations, weights)
        if backend == "auto":
            reason = why_not_runtime(model)
            if reason is not None:
                log.warning("%s: linears multiply by the exact reference product", reason)
            backend = "triton" if reason is None else "reference"
        if backend == "triton":
            operations = triton_operations()
            integer_runtime(model, weights, rotations, self.quant, self.kv, operations)
            return model
        insert_integer_linears(model, weights, rotations, self.quant, backend)
        attach_kv(model, kv_path(model, rotations.r3, self.kv), store=True)
        return model

    def dequantized(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the quantized network as learning sees it: products of dequantized floats.

        A linear holds its floats only while it computes.
        """
        model = self._bare(rotations, weights)
        write_ends(model, weights)
        self._fake_quant(model, rotations)
        for name, _, _, linear in linears_of(model):
            if name in weights:
                dequantize_in_calls(linear, weights[name])
        return model

    def _bare(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        """Return the rotated model whose linears are about to take these weights."""
        return self.fused(rotations)

    def _fake_quant(self, model: PreTrainedModel, rotations: RotationSet) -> None:
        insert_fake_quant(model, rotations, self.quant)
        attach_kv(model, kv_path(model, rotations.r3, self.kv), store=False)


class ExactNetworks(Networks):
    """Networks that compute in float64, for the gate of the hand-off.

    Numbers are those of the original's own dtype, and what has levels is never there in float64: a
    gate takes no more memory than the network that it is for.
    """

    def _bare(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        model = self.fused(rotations)
        for name, _, _, linear in linears_of(model):
            if name in weights:
                empty_weight(linear, torch.float64)
        exact_norms(model)
        return cast_model(model, torch.float64)


def stored_bytes(
    model: PreTrainedModel, weights: Mapping[str, QuantizedWeight] | None = None
) -> int:
    """Return the bytes of a checkpoint: packed weights, and 16 bits for every other number.

    A quantized model stores embedding and head apart, even where the original ties them.
    """
    numbers = sum(p.numel() for p in model.parameters())
    if weights is None:
        return numbers * _STORED_BYTES
    numbers -= sum(w.levels.numel() for w in weights.values())
    if model.config.tie_word_embeddings:
        numbers += linear_at(model, family_of(model.config.model_type).embedding).weight.numel()
    packed = sum(
        t.numel() * t.element_size() for w in weights.values() for t in w.tensors().values()
    )
    return numbers * _STORED_BYTES + packed


@torch.no_grad()
def channel_peaks(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the largest |input| per layer and channel of the attention: (layers, hidden).

    ids: (1, tokens). Linears that share their input are read once, at the first of them, behind
    what runs online.
    """
    peaks: list[torch.Tensor] = []
    hooks = []
    for _, _, seam, linear in linears_of(model):
        if seam.name.endswith("q_proj"):

            def keep(module: nn.Module, args: tuple) -> None:
                x = module.path(args[0]) if isinstance(module, FakeQuantLinear) else args[0]
                peaks.append(x.detach().abs().flatten(0, -2).amax(0).float().cpu())

            hooks.append(linear.register_forward_pre_hook(keep))
    model(input_ids=ids.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(peaks)
