"""Build a layer's modules from its map: what the readers of an input multiply, and how they read.

A Maker says what a linear multiplies; the LayerBuilder puts the modules where the stock ones were.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear, input_paths
from spinlab.formats import Format, IntegerFormat, name_of
from spinlab.model.layer import Layer
from spinlab.model.modules import linears_of, map_of, norm_at
from spinlab.runtime.fused.attention import IntegerAttention
from spinlab.runtime.fused.modules import (
    GateReader,
    IntegerMLP,
    NormReader,
    Product,
    Reader,
    add_in_products,
)
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.fused.products import PackedProduct, SeparateProducts, stack
from spinlab.runtime.kernels.formats import PackedWeight, pack_weight
from spinlab.runtime.kernels.matmul import kernel_for
from spinlab.runtime.quantized import Quantized
from spinlab.runtime.stock.linear import IntegerLinear, stacked_bias
from spinlab.weights.quantized import QuantizedWeight, set_dequantized

log = logging.getLogger(__name__)


class Maker(ABC):
    """Say what linears multiply, and remember those that no operation takes."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.apart: dict[str, list[str]] = {}  # reason -> names
        self.turned_apart: list[str] = []  # inputs whose transforms have no kernel

    @abstractmethod
    def packed(
        self, name: str, linear: nn.Linear, path: InputPath
    ) -> tuple[PackedWeight | None, str]:
        """Return a linear's packed weight, or None and the reason why there is none."""

    def twin(self, name: str, linear: nn.Linear, path: InputPath) -> nn.Module:
        """Return what stands for a linear that is not packed with those beside it."""
        raise AssertionError(f"{name} has no weight but a packed one")

    def product(self, linears: Mapping[str, nn.Linear], path: InputPath) -> Product:
        """Return what the linears that read one input multiply."""
        found = {name: self.packed(name, linear, path) for name, linear in linears.items()}
        packed = [weight for weight, _ in found.values() if weight is not None]
        whole = stack(packed) if len(packed) == len(found) else None
        if whole is not None:
            bias = stacked_bias(list(linears.values()))
            return PackedProduct(whole, bias, self.operations)
        default = "beside others of another format"
        for name, (_, reason) in found.items():
            self.apart.setdefault(reason or default, []).append(name)
        return SeparateProducts([self.twin(n, linear, path) for n, linear in linears.items()])

    def report(self) -> None:
        """Warn, once for all, of linears that run outside the 4-bit products."""
        if self.apart:
            kinds = (f"{_some(names)} ({reason})" for reason, names in self.apart.items())
            log.warning("outside the 4-bit kernels: %s", "; ".join(kinds))
        if self.turned_apart:
            log.warning("turned in torch, before the kernels: what %s", _some(self.turned_apart))

    @staticmethod
    def input_groups(linear: nn.Linear, path: InputPath) -> int:
        """Return how many groups a linear's input has; floats count as one."""
        if path.quantizer is None:
            return 1
        return linear.weight.shape[1] // (path.quantizer.group_size or linear.weight.shape[1])


class QuantizedMaker(Maker):
    """Take quantized weights, by name; a linear without one keeps its own."""

    def __init__(self, weights: Mapping[str, QuantizedWeight], operations: Operations) -> None:
        super().__init__(operations)
        self.weights = weights

    def packed(
        self, name: str, linear: nn.Linear, path: InputPath
    ) -> tuple[PackedWeight | None, str]:
        """Pack a weight for its inputs."""
        weight, groups = self.weights.get(name), self.input_groups(linear, path)
        if weight is None:
            return None, "16-bit weights"
        if not weight.format.is_int4:
            return None, f"{_kind(weight.format)} weights"
        if path.quantizer is not None and not _by_kernels(path.quantizer.format):
            return None, f"{_kind(path.quantizer.format)} inputs"
        if not _nest(weight.groups, groups):
            return None, "the groups of weights and inputs do not nest"
        if linear.weight.shape[1] % (2 * max(weight.groups, groups)):
            return None, "a group has an odd width"
        out, width = linear.weight.shape
        reason = self.operations.why_not(width, out, max(weight.groups, groups))
        if groups == 1 and path.quantizer is not None:  # a whole row is quantized at once
            reason = reason or self.operations.why_not(width, out, 1)
        if reason:
            return None, reason
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        return pack_weight(weight, groups, dtype).to(linear.weight.device), ""

    def twin(self, name: str, linear: nn.Linear, path: InputPath) -> nn.Module:
        """Return a linear that multiplies integers exactly, or else the floats they stand for."""
        weight, groups = self.weights.get(name), self.input_groups(linear, path)
        if weight is None:
            return FakeQuantLinear(linear, path)
        of_input = None if path.quantizer is None else path.quantizer.format
        integer = of_input is not None and of_input.is_int8 and weight.format.is_int8
        if not integer or not _nest(weight.groups, groups):
            set_dequantized(linear, weight)
            return FakeQuantLinear(linear, path)
        dtype, device = linear.weight.dtype, linear.weight.device
        matmul = kernel_for("torch", weight.format, device)
        return IntegerLinear(weight, linear.bias, path, matmul, dtype).to(device)


class LayerBuilder:
    """Swap the attention, the MLP and the norms of every layer of a stock model."""

    def __init__(self, model: PreTrainedModel, maker: Maker, parts: Quantized) -> None:
        self.model, self.maker, self.kv = model, maker, parts.kv
        self.operations, self.map = maker.operations, map_of(model)
        self.like: Any = {"dtype": model.dtype, "device": model.device}
        self.paths = input_paths(self.map, parts.rotations, parts.quant)
        self.linears: dict[str, dict[str, nn.Linear]] = {}
        for site, linear in linears_of(model):
            self.linears.setdefault(site.key, {})[site.path] = linear

    def build(self) -> None:
        """Swap all layers that are there."""
        for index, layer in self.map.there.items():
            self._build(index, layer)

    def _build(self, index: int, layer: Layer) -> None:
        attention, mlp = layer.attention, layer.mlp
        assert mlp is not None, "`why_not_runtime` refuses layers without a gated MLP"
        qkv, gate_up = self._behind_norm(attention.queries), self._behind_norm(mlp.gate)
        readers = qkv, Reader(*self._parts(attention.out))
        down = GateReader(*self._parts(mlp.down))
        stock = self.model.get_submodule(attention.path)
        twin = IntegerAttention(stock, index, readers, self.kv, attention, self.operations)
        gated = IntegerMLP(gate_up, down)
        self.model.set_submodule(attention.path, twin)
        self.model.set_submodule(mlp.path, gated)
        if layer.adds:
            add_in_products(self.model.get_submodule(layer.path), twin, gated)
        for reader in (attention.queries, mlp.gate):
            if (norm := self._norm_before(reader)) is not None:
                self.model.set_submodule(norm, nn.Identity())

    def _norm_before(self, reader: str) -> str | None:
        """Return the path of the norm whose output a linear reads; None before the stream."""
        return self.map.input_at[self.map.site_at[reader].key].producer

    def _behind_norm(self, reader: str) -> Reader:
        path = self._norm_before(reader)
        if path is None:
            return Reader(*self._parts(reader))
        norm = self.map.norm_at[path]
        return NormReader(norm_at(self.model, path), norm, *self._parts(reader))

    def _parts(self, reader: str) -> tuple[Product, InputPath, Operations]:
        """Return what the linears that share a linear's input multiply, and how they read."""
        key = self.map.site_at[reader].key
        path = self.paths[key]
        product = self.maker.product(self.linears[key], path)
        if isinstance(product, PackedProduct) and path.rotation is not None:
            like = torch.empty(1, self.map.input_at[key].width, **self.like)
            quantizer = path.quantizer
            if quantizer is None or not self.operations.rotates(like, path.rotation, quantizer):
                self.maker.turned_apart.append(f"{reader} reads")
        return product, path, self.operations


def _by_kernels(format: Format) -> bool:
    """Tell whether kernels quantize inputs to a format."""
    return isinstance(format, IntegerFormat) and format.is_int8


def _kind(format: Format) -> str:
    return f"{format.bits}-bit" if isinstance(format, IntegerFormat) else name_of(format)


def _nest(a: int, b: int) -> bool:
    """Tell whether one of two numbers of groups divides the other."""
    return max(a, b) % min(a, b) == 0


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"
