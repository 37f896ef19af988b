"""Transforms of a linear's input: scales, a map in blocks, DuQuant's dual transform."""

from dataclasses import dataclass, field, replace

import torch

from spinlab.model.map import Input
from spinlab.rotation.blocks import (
    BlockMap,
    BlockRotation,
    InvertibleBlocks,
    inverse_transposed,
    rotate_blocks,
)
from spinlab.rotation.duquant import DualTransform


@dataclass(frozen=True, eq=False)
class Factor:
    """Deal channels, place j taking number order[j], then multiply by blocks: (k, b, b)."""

    blocks: torch.Tensor
    order: torch.Tensor | None = None

    def applied(self, x: torch.Tensor) -> torch.Tensor:
        """Return what becomes of numbers x: (..., in), in their dtype."""
        dealt = x if self.order is None else x.index_select(-1, self.order.to(x.device))
        return rotate_blocks(dealt, self.blocks)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Factor":
        """Return this on a device, in a dtype."""
        order = None if self.order is None else self.order.to(device)
        return Factor(self.blocks.to(device, dtype), order)


@dataclass(frozen=True, eq=False)
class ScaledDual:
    """Divide inputs by a scale, then turn them: x ↦ (x / scale)·T; either part may be absent.

    scale: (in,) float64. With `folded` the division is not done here: what produces the input
    (a norm, or a linear) carries it, behind R1 or R2. dual: T, a dual transform, a rotation in
    blocks, or blocks that are no rotations. With `rounded` the matrices that inputs meet, a scale
    that is not folded among them, are rounded to bfloat16, and weights get the inverse of those.
    """

    scale: torch.Tensor | None = None
    folded: bool = True
    dual: BlockMap | None = None
    rounded: bool = False
    # by dtype and device, what inputs meet: this transform, or its factors if they are rounded
    _moved: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def is_online(self) -> bool:
        """Tell whether anything is left to do while the network runs."""
        return self.dual is not None or (self.scale is not None and not self.folded)

    @property
    def width(self) -> int:
        if self.dual is not None:
            return self.dual.width
        assert self.scale is not None
        return self.scale.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Transform inputs x: (..., in), in float32 or wider.

        Between rounded rotations numbers of bfloat16 are of bfloat16; float16 has less range.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        if self._is_rounded:
            between = x.dtype if x.dtype == torch.bfloat16 else dtype
            for factor in self._factors_on(x.device, dtype):
                wide = factor.applied(wide).to(between).to(dtype)
            return wide.to(x.dtype)
        moved = self._to(dtype, x.device)
        if moved.scale is not None and not self.folded:
            wide = wide / moved.scale
        return (wide if moved.dual is None else moved.dual.turned(wide)).to(x.dtype)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return (W·diag(scale))·T⁻ᵀ: (out, in); of rounded factors, with the inverse of those."""
        if self._is_rounded:
            if self.scale is not None and self.folded:
                weight = weight * self.scale.to(weight)
            for factor in self.factors():
                inverse = inverse_transposed(factor.blocks.to(weight.device))
                weight = replace(factor, blocks=inverse).applied(weight)
            return weight
        moved = self._made(weight.dtype, weight.device)
        if moved.scale is not None:
            weight = weight * moved.scale
        return weight if moved.dual is None else moved.dual.of_weight(weight)

    @property
    def _is_rounded(self) -> bool:
        return self.rounded and self.dual is not None

    def factors(self) -> "list[Factor]":
        """Return what inputs meet in turn, in float64.

        A scale that is not folded is part of the first, which then is a matrix for every block.
        """
        assert self.dual is not None
        first = self.dual.first.double()
        if self.scale is not None and not self.folded:
            first = first / self.scale.to(first).view(-1, first.shape[1], 1)
        found = [Factor(first)]
        if isinstance(self.dual, DualTransform):
            found.append(Factor(self.dual.second.double(), self.dual.permutation))
        if not self._is_rounded:
            return found
        return [replace(factor, blocks=factor.blocks.bfloat16().double()) for factor in found]

    def _factors_on(self, device: torch.device, dtype: torch.dtype) -> "list[Factor]":
        key = (dtype, device)
        if key not in self._moved:
            self._moved[key] = [factor.to(device, dtype) for factor in self.factors()]
        return self._moved[key]

    def _to(self, dtype: torch.dtype, device: torch.device) -> "ScaledDual":
        key = (dtype, device)
        if key not in self._moved:
            self._moved[key] = self._made(dtype, device)
        return self._moved[key]

    def _made(self, dtype: torch.dtype, device: torch.device) -> "ScaledDual":
        return replace(
            self,
            scale=None if self.scale is None else self.scale.to(device, dtype),
            dual=None if self.dual is None else self.dual.to(device, dtype),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored form."""
        stored = {} if self.dual is None else self.dual.tensors()
        if self.scale is not None:
            stored["folded_scale" if self.folded else "scale"] = self.scale
        return stored

    @staticmethod
    def from_tensors(stored: dict[str, torch.Tensor], rounded: bool = False) -> "ScaledDual":
        """Rebuild a transform from its stored form."""
        folded = "folded_scale" in stored
        scale = stored.get("folded_scale" if folded else "scale")
        kinds = {"permutation": DualTransform, "matrix": InvertibleBlocks, "first": BlockRotation}
        kind = next((kinds[part] for part in kinds if part in stored), None)
        return ScaledDual(scale, folded, kind and kind.from_tensors(stored), rounded)


def to_channels(rows: torch.Tensor, input: Input) -> torch.Tensor:
    """Return (..., width) numbers of an input's channels, given those of the producer's rows.

    With grouped queries a row of the values is read once by every query head that shares it.
    """
    runs = rows.unflatten(-1, (-1, 1, input.run))
    return runs.expand(*runs.shape[:-2], input.shared, -1).flatten(-3)


def to_rows(channels: torch.Tensor, input: Input) -> torch.Tensor:
    """Return what gives such numbers (..., width) in `to_channels`: one of each that are shared."""
    return channels.unflatten(-1, (-1, input.shared, input.run))[..., 0, :].flatten(-2)


def of_rows(of_channels: torch.Tensor, input: Input) -> torch.Tensor:
    """Return the gradient of rows, given that of what `to_channels` makes of them."""
    return of_channels.unflatten(-1, (-1, input.shared, input.run)).sum(-2).flatten(-2)


_LEAST = torch.finfo(torch.bfloat16).eps / 2  # what numbers below 1 are apart, down to a half


def in_gains(scale: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Return the nearest scale whose inverse is offset + a bfloat16 number, and not nothing.

    A gain of any dtype then holds it, of a norm whose gain is `offset` + weight.
    """
    stored = (1 / scale.double() - offset).bfloat16().double()
    return 1 / (stored.clamp(min=(_LEAST - 1) * offset) + offset if offset else stored)


def smoothing_scale(
    activations: torch.Tensor, weights: torch.Tensor, alpha: float, offset: float = 0.0
) -> torch.Tensor:
    """Return max|X_j|^alpha / max|W_j|^(1-alpha) per channel (SmoothQuant, eq. 4).

    activations, weights: (in,) the largest magnitudes per input channel; weights of all linears
    that read it, where DuQuant's code looks at q_proj and up_proj alone. A norm's gain can hold the
    result (`in_gains` of `offset`). Channels without activations or weights keep scale 1. Xiao et
    al. 2023, arXiv 2211.10438.
    """
    scale = activations.double().pow(alpha) / weights.double().pow(1 - alpha)
    scale = torch.where((activations > 0) & (weights > 0), scale, 1.0)
    return in_gains(scale, offset)
