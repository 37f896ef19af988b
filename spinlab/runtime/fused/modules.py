"""The modules around the linears: each prepares the input of some of them and multiplies it.

Where a linear reads quantized inputs, what comes before it (norm, gate, rotation) and the quantizer
are one operation. Transforms that no operation knows run in torch, and the quantizer behind them.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from spinlab.fakequant.activations import InputPath
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.map import Norm
from spinlab.rotation.inputs import ScaledDual
from spinlab.runtime.fused.operations import Operations
from spinlab.runtime.fused.products import PackedProduct, SeparateProducts
from spinlab.runtime.kernels.formats import TokenLevels

Product = PackedProduct | SeparateProducts


class Reader(nn.Module):
    """Rotate, quantize and multiply an input that some linears share."""

    def __init__(self, product: Product, path: InputPath, operations: Operations) -> None:
        super().__init__()
        self.product, self.path, self.operations = product, path, operations

    @property
    def quantizer(self) -> TokenQuantizer | None:
        """What quantizes the input of a packed product; None where that stays in floats."""
        return self.path.quantizer if isinstance(self.product, PackedProduct) else None

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Return the outputs side by side, (..., out), for x: (..., in).

        added: (..., out), to which they are added, if given.
        """
        if isinstance(self.product, SeparateProducts):
            out = self.product(x)
            return out if added is None else added + out
        if self.quantizer is None:
            rotated, rows = self._rotated(x).flatten(0, -2), _rows(added)
            return self.product.of_floats(rotated, rows).unflatten(0, x.shape[:-1])
        return self._multiply(self._levels(x, self.quantizer), x, added)

    def _levels(self, x: torch.Tensor, quantizer: TokenQuantizer) -> TokenLevels:
        rotation = self.path.rotation
        if rotation is not None and self.operations.rotates(x, rotation, quantizer):
            return self.operations.rotate_quantize(
                x, rotation, quantizer, summed=self._summed(quantizer)
            )
        return self.operations.quantize(self._rotated(x), quantizer, summed=self._summed(quantizer))

    def _summed(self, quantizer: TokenQuantizer) -> bool:
        assert isinstance(self.product, PackedProduct)
        return self.product.needs_sums(quantizer)

    def _multiply(
        self, levels: TokenLevels, like: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs for levels, in the shape and dtype of the floats they came from."""
        assert isinstance(self.product, PackedProduct)
        out = self.product.of_levels(levels, like.dtype, _rows(added))
        return out.unflatten(0, like.shape[:-1])

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.path.rotation is None else self.path.rotation(x)


class NormReader(Reader):
    """Norm the residual stream before its readers; an Identity stands where the stock norm was.

    A gain of 1, as where it is folded, is not read again: it must stay 1.
    """

    def __init__(
        self,
        norm: nn.Module,
        described: Norm,
        product: Product,
        path: InputPath,
        operations: Operations,
    ) -> None:
        super().__init__(product, path, operations)
        self.norm, self.epsilon, self.offset = norm, described.epsilon, described.offset
        self.has_gain = not bool((self._gain() == 1).all())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs side by side, (..., out), for the stream x: (..., hidden)."""
        rotation, quantizer = self.path.rotation, self.quantizer
        known = isinstance(rotation, ScaledDual | None)
        if quantizer is None or not known or not self.operations.rotates(x, rotation, quantizer):
            return super().forward(self.norm(x))
        gain = self._gain() if self.has_gain else None
        levels = self.operations.norm_quantize(
            x, gain, self.epsilon, quantizer, rotation, summed=self._summed(quantizer)
        )
        return self._multiply(levels, x)

    def _gain(self) -> torch.Tensor:
        """Return the gain: (width,)."""
        weight = self.norm.weight
        assert isinstance(weight, torch.Tensor), "a norm has a gain"
        return weight.detach() + self.offset if self.offset else weight.detach()


class GateReader(Reader):
    """Gate, rotate, quantize and multiply: what reads silu(gate)·up."""

    def of_gate(
        self, gate: torch.Tensor, up: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the output (..., out) for gate and up: (..., in), added to `added` if given."""
        rotation, quantizer = self.path.rotation, self.quantizer
        if quantizer is None or not self.operations.rotates(gate, rotation, quantizer):
            return self(silu(gate) * up, added)
        levels = self.operations.gate_quantize(
            gate, up, rotation, quantizer, summed=self._summed(quantizer)
        )
        return self._multiply(levels, gate, added)


class IntegerMLP(nn.Module):
    """Stand for a stock gated MLP and the norm before it, where there is one."""

    def __init__(self, gate_up: Reader, down: GateReader) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Map the stream (..., hidden) to what is added to it, or to its sum with `added`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down.of_gate(gate, up, added)


def add_in_products(layer: nn.Module, attention: nn.Module, mlp: IntegerMLP) -> None:
    """Let products add to the stream what the twins of attention and MLP give it, in place.

    For layers that are nothing but x + attention(x), then x + mlp(x). The layer stays one of its
    class, which those who record its outputs look for.
    """
    layer.forward = partial(_add, attention, mlp)  # type: ignore[method-assign]


def _add(
    attention: nn.Module, mlp: nn.Module, hidden_states: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    x, _ = attention(hidden_states, added=hidden_states, **kwargs)
    return mlp(x, added=x)


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor of any shape as rows (tokens, width)."""
    return None if x is None else x.flatten(0, -2)
